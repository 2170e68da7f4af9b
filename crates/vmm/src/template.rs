//! A booted guest, frozen: what clones are made of.
//!
//! A template is a folder: the guest's memory, its device state, its scratch disk (mounted in the
//! guest), and the FUSE_INIT its share began with. It is written beside its final place and renamed,
//! so a folder that exists is whole.

use crate::{
    command::Origin,
    disk,
    error::{Stage, VmmError, at},
    vm::{self, Vm, VmStreams},
};
use a3s_box_sys::memfd;
use a3s_box_types::shim::{Accel, Start, VmConfig, VmSize};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{
    fs::{self, File},
    future::Future,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

/// Part of a template's key: what this file and the command line mean.
pub const FORMAT: u32 = 6;
/// The device state.
pub const STATE_FILE: &str = "state";
/// The guest's memory, sparse.
pub const RAM_FILE: &str = "ram";
/// The scratch disk clones copy.
pub const DISK_FILE: &str = "disk.ext4";
/// The share's first request, for the clone's server to answer again.
pub const FUSE_INIT_FILE: &str = "fuse_init.bin";

/// A cold boot takes 2 to 3 seconds translated; a busy host may need ten times that.
const BOOT_DEADLINE: Duration = Duration::from_secs(60);
/// Long enough for the guest to see that its ports were closed; a template is built once.
const SETTLE: Duration = Duration::from_millis(200);

/// What a template is built from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TemplateConfig {
    /// QEMU's binary.
    pub qemu: PathBuf,
    /// What executes the guest.
    pub accel: Accel,
    /// bzImage.
    pub kernel: PathBuf,
    /// cpio with the agent and its modules.
    pub initramfs: PathBuf,
    /// Clones have this size.
    pub size: VmSize,
    /// As many processors a clone may ever have, as [`VmConfig::most_vcpus`].
    pub most_vcpus: u32,
    /// User id QEMU runs as.
    pub uid: u32,
    /// Size of the scratch disk in bytes.
    pub disk_bytes: u64,
    /// The template's folder; must not exist yet.
    pub dir: PathBuf,
}

/// Names what a template of this order would hold: two orders with one key make the same template.
///
/// # Errors
/// Reading the kernel or the initramfs, or running QEMU.
pub fn key(config: &TemplateConfig) -> io::Result<String> {
    let mut hash = Sha256::new();
    hash.update(FORMAT.to_le_bytes());
    for path in [&config.kernel, &config.initramfs] {
        let bytes = fs::read(path)
            .map_err(|err| io::Error::new(err.kind(), format!("{}: {err}", path.display())))?;
        hash.update(Sha256::digest(bytes));
    }
    let version = Command::new(&config.qemu)
        .arg("--version")
        .output()
        .map_err(|err| io::Error::new(err.kind(), format!("{}: {err}", config.qemu.display())))?;
    hash.update(&version.stdout);
    let TemplateConfig { accel, size, most_vcpus, disk_bytes, .. } = config;
    hash.update(format!("{accel:?} {size:?} {most_vcpus} {disk_bytes}"));
    // Device state of one CPU model does not load on another.
    let model = fs::read_to_string("/proc/cpuinfo")?;
    hash.update(model.lines().find(|line| line.starts_with("model name")).unwrap_or_default());
    let digest: String =
        hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    Ok(digest)
}

/// Boots a guest and freezes it. `tap` is any tap with a virtio-net header; `volumes` is handed the
/// share's stream, answers FUSE_INIT and returns its bytes.
///
/// # Errors
/// The stage that failed, with the console's tail. The folder then does not exist.
pub async fn build<F, R>(config: &TemplateConfig, tap: OwnedFd, volumes: F) -> Result<(), VmmError>
where
    F: FnOnce(UnixStream) -> R,
    R: Future<Output = io::Result<Vec<u8>>>,
{
    let parent = config.dir.parent().ok_or_else(|| {
        VmmError::new(Stage::Prepare, format!("{} is no template folder", config.dir.display()))
    })?;
    fs::create_dir_all(parent).map_err(at(Stage::Prepare))?;
    let work = tempfile::Builder::new()
        .prefix(".building-")
        .tempdir_in(parent)
        .map_err(at(Stage::Prepare))?;
    fill(config, work.path(), tap, volumes).await?;
    let kept = work.keep();
    fs::rename(&kept, &config.dir).map_err(|err| {
        drop(fs::remove_dir_all(&kept));
        VmmError::new(Stage::Save, err)
    })
}

async fn fill<F, R>(
    config: &TemplateConfig,
    dir: &Path,
    tap: OwnedFd,
    volumes: F,
) -> Result<(), VmmError>
where
    F: FnOnce(UnixStream) -> R,
    R: Future<Output = io::Result<Vec<u8>>>,
{
    let disk = disk::format(&dir.join(DISK_FILE), config.disk_bytes).map_err(at(Stage::Prepare))?;
    let ram = File::options().read(true).write(true).create_new(true).open(dir.join(RAM_FILE));
    let ram = ram.map_err(at(Stage::Prepare))?;
    // QEMU opens it again by /proc/self/fd as its own user.
    std::os::unix::fs::fchown(&ram, Some(config.uid), None).map_err(at(Stage::Prepare))?;
    ram.set_len(u64::from(config.size.memory_mb) << 20).map_err(at(Stage::Prepare))?;
    let state = File::options().write(true).create_new(true).open(dir.join(STATE_FILE));
    let state = state.map_err(at(Stage::Prepare))?;
    let vm_config = VmConfig {
        qemu: config.qemu.clone(),
        accel: config.accel,
        start: Start::Boot { kernel: config.kernel.clone(), initramfs: config.initramfs.clone() },
        size: config.size,
        most_vcpus: config.most_vcpus,
        uid: config.uid,
    };
    let origin = Origin::Template {
        boot: vm::boot(&vm_config, &config.kernel, &config.initramfs)?,
        ram: ram.try_clone().map_err(at(Stage::Prepare))?.into(),
    };
    // Lanes stay connected: to a clone's guest nothing has changed about them.
    let (mut vm, VmStreams { agent, volumes: share, lanes: _lanes }) =
        Vm::spawn(&vm_config, origin, disk, tap, dir.join("console.log")).await?;
    let init = match ready(&mut vm, agent, volumes(share)).await {
        Ok(init) => init,
        Err((stage, err)) => return Err(vm.failed(stage, err).await),
    };
    if let Err(err) = save(&vm, &state).await {
        return Err(vm.failed(Stage::Save, err).await);
    }
    vm.kill().await;
    fs::write(dir.join(FUSE_INIT_FILE), init).map_err(at(Stage::Save))?;
    let order = serde_json::to_vec_pretty(config).map_err(at(Stage::Save))?;
    fs::write(dir.join("template.json"), order).map_err(at(Stage::Save))?;
    std::os::unix::fs::fchown(&ram, Some(0), None).map_err(at(Stage::Save))?;
    Ok(())
}

type Failed = (Stage, Box<dyn std::error::Error + Send + Sync>);

/// Waits for share and agent, then hangs up on both, so that a clone's host connects anew.
async fn ready(
    vm: &mut Vm,
    agent: UnixStream,
    share: impl Future<Output = io::Result<Vec<u8>>>,
) -> Result<Vec<u8>, Failed> {
    let mut agent =
        tokio::net::UnixStream::from_std(agent).map_err(|err| (Stage::Prepare, err.into()))?;
    let both = async {
        tokio::try_join!(
            async { share.await.map_err(|err| (Stage::Hello, Failed::from_io(err))) },
            async {
                vm::wait_hello(&mut agent, BOOT_DEADLINE)
                    .await
                    .map_err(|err| (Stage::Hello, err.into()))
            },
        )
    };
    let init = tokio::select! {
        both = tokio::time::timeout(BOOT_DEADLINE, both) => match both {
            Ok(both) => both?.0,
            Err(late) => return Err((Stage::Hello, late.into())),
        },
        exit = vm.wait() => return Err((Stage::Hello, exit.reason.into())),
    };
    drop(agent);
    tokio::time::sleep(SETTLE).await;
    Ok(init)
}

trait FromIo {
    fn from_io(err: io::Error) -> Box<dyn std::error::Error + Send + Sync>;
}

impl FromIo for Failed {
    fn from_io(err: io::Error) -> Box<dyn std::error::Error + Send + Sync> {
        format!("the share's first request: {err}").into()
    }
}

async fn save(vm: &Vm, state: &File) -> io::Result<()> {
    let mut qmp = vm.qmp.lock().await;
    vm::skip_shared_memory(&mut qmp).await?;
    qmp.execute("stop", serde_json::json!({})).await?;
    qmp.give_fd(STATE_FILE, state.as_fd()).await?;
    qmp.execute("migrate", serde_json::json!({ "uri": format!("fd:{STATE_FILE}") })).await?;
    qmp.migration_ended().await
}

/// A template whose memory is loaded.
#[derive(Debug)]
pub struct Template {
    dir: PathBuf,
    ram: File,
}

impl Template {
    /// Loads the memory of the template in `dir` into a sealed memory file.
    ///
    /// # Errors
    /// Reading the folder, or making the memory file.
    pub fn open(dir: &Path) -> io::Result<Self> {
        let saved = File::open(dir.join(RAM_FILE))?;
        let ram = memfd::create("a3s-box-template")?;
        ram.set_len(saved.metadata()?.len())?;
        let mut offset = 0;
        while let Some((start, end)) = disk::next_data(&saved, offset)? {
            disk::copy_range(&saved, &ram, start, end)?;
            offset = end;
        }
        memfd::seal(&ram)?;
        Ok(Self { dir: dir.to_owned(), ram })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A descriptor of the sealed memory, for a shim to inherit.
    ///
    /// # Errors
    /// When no descriptor is free.
    pub fn ram(&self) -> io::Result<OwnedFd> {
        Ok(self.ram.try_clone()?.into())
    }
}
