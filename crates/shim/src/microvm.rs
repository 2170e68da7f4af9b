//! The boundary that is a virtual machine: QEMU and the volume server.

use crate::{boundary::Owner, volume_server};
use a3s_box_failpoint as failpoint;
use a3s_box_lane::lease::Lender;
use a3s_box_sys::duplex::Duplex;
use a3s_box_types::shim::{CONSOLE_FILE, MicrovmConfig, Start};
use a3s_box_vmm::{Stage, Vm, VmParts, VmStreams, disk, last_words, template, wait_hello};
use anyhow::Context;
use std::{
    fs::File,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};
use tokio::{
    net::UnixStream,
    time::{sleep, timeout},
};

/// A cold boot under full load.
const BOOT_DEADLINE: Duration = Duration::from_secs(60);
/// A clone needs a hundredth of that, and one that does not come is replaced by a boot.
const CLONE_DEADLINE: Duration = Duration::from_secs(30);
/// How long after another part's end its machine's own end is still the reason.
const MACHINE_FOLLOWS: Duration = Duration::from_secs(1);

/// What the machine is started with.
#[derive(Debug)]
pub struct Parts {
    /// The order.
    pub config: MicrovmConfig,
    /// The share's folder, mounted.
    pub share_root: PathBuf,
    /// The volume server's end of what it is told about the share.
    pub orders: std::os::unix::net::UnixStream,
    /// The guest's card.
    pub tap: OwnedFd,
    /// The template's memory, for a clone.
    pub template_ram: Option<OwnedFd>,
}

/// From start to end; why it ended.
pub async fn live(owner: &mut Owner, parts: Parts) -> anyhow::Result<String> {
    let Parts { config, share_root, orders, tap, template_ram } = parts;
    let vm_parts = VmParts {
        disk: scratch_disk(&config).context("make the scratch disk")?,
        config: config.vm.clone(),
        tap,
        template_ram,
        console_file: owner.folder.join(CONSOLE_FILE),
    };
    let is_clone = matches!(config.vm.start, Start::Clone { .. });
    let started = Vm::start(vm_parts).await;
    if is_clone && matches!(&started, Err(err) if err.stage == Stage::Load) {
        owner.clone_failed();
    }
    let (mut vm, VmStreams { agent, volumes, lanes }) = started?;
    failpoint::hit("shim-vmm-started");
    owner.reached("vmm_spawned");
    owner.show_console(vm.console());
    owner.show_lanes(Lender::new(lanes));
    let room_mb = config.most_memory_mb.saturating_sub(config.vm.size.memory_mb);
    owner.show_hardware(vm.hardware(room_mb));
    owner.started(vm.pid(), |processes| &mut processes.vmm)?;
    failpoint::hit("shim-vmm-listed");
    let init = match &config.vm.start {
        Start::Clone { template } => Some(template.join(template::FUSE_INIT_FILE)),
        Start::Boot { .. } => None,
    };
    let giver = a3s_box_volume::Owner { orders, charged: config.vm.uid };
    let mut volumes = volume_server::start(&share_root, volumes, giver, init.as_deref())
        .context("start the volume server")?;
    owner.started(volumes.pid(), |processes| &mut processes.volume_server)?;
    failpoint::hit("shim-volume-server-listed");
    let (spoke, lifeless) = (AtomicBool::new(false), AtomicBool::new(false));
    let deadline = if is_clone { CLONE_DEADLINE } else { BOOT_DEADLINE };
    let greeted = async {
        let mut stream = UnixStream::from_std(agent)?;
        if let Err(err) = wait_hello(&mut stream, deadline).await {
            sleep(MACHINE_FOLLOWS).await;
            lifeless.store(true, Ordering::Relaxed);
            return Err(err.into());
        }
        spoke.store(true, Ordering::Relaxed);
        Ok(Duplex::new(stream.into_std()?)?)
    };
    let ended = async {
        tokio::select! {
            biased;
            exit = vm.wait() => {
                // One that was killed says nothing of its template.
                let own_end = !exit.by_signal && !spoke.load(Ordering::Relaxed);
                lifeless.fetch_or(own_end, Ordering::Relaxed);
                exit.reason
            }
            why = volumes.ended("volume server") => {
                // It ends with its machine as well, and may be seen to first.
                timeout(MACHINE_FOLLOWS, vm.wait()).await.map_or(why, |exit| exit.reason)
            }
        }
    };
    let why = owner.serve(greeted, ended).await;
    if is_clone && lifeless.load(Ordering::Relaxed) {
        owner.clone_failed();
    }
    vm.kill().await;
    let stage = Stage::Hello.to_string();
    let why = match spoke.into_inner() || why.starts_with(&stage) {
        true => why,
        false => format!("{stage}: {why}"),
    };
    Ok(why + &last_words(&vm.console_tail()))
}

fn scratch_disk(config: &MicrovmConfig) -> io::Result<File> {
    if let Some(folder) = config.disk.parent() {
        std::fs::create_dir_all(folder)?;
    }
    match &config.vm.start {
        Start::Clone { template } => {
            let from = File::open(template.join(template::DISK_FILE))?;
            disk::copy_sparse(&from, Path::new(&config.disk))
        }
        Start::Boot { .. } => disk::format(&config.disk, config.disk_bytes),
    }
}
