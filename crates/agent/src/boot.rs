//! What PID 1 does before anything else: mounts, modules, the scratch disk, the share.

use crate::{
    cgroup,
    config::Config,
    error::{Error, Step},
    network, port,
};
use rustix::{
    mount::{MountFlags, MountPropagationFlags, mount, mount_bind, mount_change, mount_move},
    process::{chdir, chroot},
};
use std::{fs, path::Path};

/// The writable layers' disk.
const DISK: &str = "/dev/vda";
/// Decompressed kernel modules and the order to load them in.
const MODULES: &str = "/modules";

/// Mounts the kernel's file systems and gets ready to log.
pub fn early(config: &Config) -> Result<(), Error> {
    movable_root()?;
    let quiet = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    for (kind, place, flags, options) in [
        ("proc", "/proc", quiet, c""),
        ("sysfs", "/sys", quiet, c""),
        ("devtmpfs", "/dev", MountFlags::NOSUID, c"mode=755"),
        (
            "devpts",
            "/dev/pts",
            MountFlags::NOSUID | MountFlags::NOEXEC,
            c"mode=620,gid=5,ptmxmode=666",
        ),
        ("tmpfs", "/run", MountFlags::NOSUID | MountFlags::NODEV, c"mode=755"),
        ("tmpfs", "/tmp", MountFlags::NOSUID | MountFlags::NODEV, c"mode=1777"),
        ("cgroup2", "/sys/fs/cgroup", quiet, c""),
    ] {
        fs::create_dir_all(place).step(format_args!("mount {place}"))?;
        mount(kind, place, kind, flags, options).step(format_args!("mount {place}"))?;
    }
    crate::log::to_kernel().step("/dev/kmsg")?;
    // Whoever is killed for want of memory, it is not the agent. Children set their own score.
    fs::write("/proc/self/oom_score_adj", "-1000").step("oom_score_adj")?;
    fs::create_dir_all(&config.runtime).step("runtime folder")?;
    if let Some(root) = config.cgroups.parent() {
        cgroup::delegate(root)?;
    }
    fs::create_dir_all(&config.cgroups).step("the pod's cgroup")
}

/// Loads modules, mounts the scratch disk.
pub fn devices(config: &Config) -> Result<(), Error> {
    load_modules(Path::new(MODULES))?;
    network::loopback_up().step("loopback")?;
    fs::create_dir_all(&config.scratch).step("scratch")?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOATIME;
    mount(DISK, &config.scratch, "ext4", flags, None).step(format_args!("mount {DISK}"))
}

/// Mounts the share. Its two threads live as long as the guest, so no process may be forked from
/// this one afterwards.
pub fn share(config: &Config) -> Result<(), Error> {
    let what = "the share";
    fs::create_dir_all(&config.share).step(what)?;
    let Some(port) = port::open("volumes").step(what)? else {
        crate::log::error(format_args!("no port named volumes: nothing is shared with the host"));
        return Ok(());
    };
    let fuse = a3s_box_volume::mount(&config.share).step(what)?;
    // Volumes that the host adds or takes away later reach containers that ask for it.
    mount_change(&config.share, MountPropagationFlags::SHARED).step(what)?;
    let target = config.share.clone();
    std::thread::Builder::new()
        .name("share-requests".to_owned())
        .stack_size(64 << 10)
        .spawn(move || {
            if let Err(error) = a3s_box_volume::pump(fuse, port, &target) {
                crate::log::error(format_args!("share: {error}"));
            }
        })
        .step(what)?;
    Ok(())
}

/// The kernel's initial root cannot be pivoted away from. A bind mount of it can, so that takes its
/// place, before anything is mounted below.
fn movable_root() -> Result<(), Error> {
    let what = "movable root";
    fs::create_dir_all("/run/root").step(what)?;
    mount_bind("/", "/run/root").step(what)?;
    chdir("/run/root").step(what)?;
    mount_move(".", "/").step(what)?;
    chroot(".").step(what)?;
    chdir("/").step(what)
}

fn load_modules(folder: &Path) -> Result<(), Error> {
    let order = fs::read_to_string(folder.join("order")).step("list of modules")?;
    for name in order.lines().filter(|line| !line.is_empty()) {
        let what = format!("module {name}");
        let file = fs::File::open(folder.join(name)).step(&what)?;
        match rustix::system::finit_module(&file, c"", 0) {
            Err(rustix::io::Errno::EXIST) => {}
            result => result.step(&what)?,
        }
    }
    // They lie in memory.
    fs::remove_dir_all(folder).step("modules")
}
