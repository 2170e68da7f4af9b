//! What a shim needs to start a guest.
#![allow(dead_code, clippy::unwrap_used, missing_docs, unreachable_pub)]

use crate::common::SHIM;
use a3s_box_sys::{namespace, tap};
use a3s_box_types::shim::{Accel, BoundaryConfig, MicrovmConfig, Start, VmConfig, VmSize};
use a3s_box_vmm::template::{Template, TemplateConfig};
use std::{
    fs,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::Command,
};

const QEMU: &str = "/usr/bin/qemu-system-x86_64";
const UID: u32 = 64_124;
pub const MOST_VCPUS: u32 = 3;
const SIZE: VmSize = VmSize { vcpus: 1, memory_mb: 512 };

pub fn guest(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guest").join(name);
    path.canonicalize().expect("`make guest` has been run")
}

/// A tap in a network namespace that only its descriptor keeps alive.
pub fn tap() -> OwnedFd {
    let make = || {
        namespace::unshare_network().unwrap();
        tap::create("tap0").unwrap()
    };
    std::thread::spawn(make).join().unwrap()
}

pub fn template(dir: &Path) -> Template {
    let config = TemplateConfig {
        qemu: QEMU.into(),
        accel: Accel::Tcg,
        kernel: guest("vmlinuz"),
        initramfs: guest("initramfs"),
        size: SIZE,
        most_vcpus: MOST_VCPUS,
        uid: UID,
        disk_bytes: 1 << 30,
        dir: dir.join("template"),
    };
    let file = dir.join("template.json");
    fs::write(&file, serde_json::to_vec(&config).unwrap()).unwrap();
    let output = Command::new(SHIM).arg("template").arg(&file).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Template::open(&config.dir).unwrap()
}

pub fn boundary(dir: &Path, start: Start) -> BoundaryConfig {
    let (qemu, accel, most_vcpus) = (QEMU.into(), Accel::Tcg, MOST_VCPUS);
    let vm = VmConfig { qemu, accel, start, size: SIZE, most_vcpus, uid: UID };
    let disk = dir.join("disk.ext4");
    BoundaryConfig::Microvm(MicrovmConfig { disk, disk_bytes: 1 << 30, most_memory_mb: 4096, vm })
}
