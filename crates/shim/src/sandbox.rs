//! A sandbox's shim, from its order to its shutdown.

use crate::{
    boundary::{CALL_WINDOW, CONNECTION_WINDOW, Handle, Parts},
    guest_mounts::GuestMounts,
    host, microvm, records,
    service::{self, Service, Shim},
    share::PodShare,
};
use a3s_box_api::shim::v1::shim_server::ShimServer;
use a3s_box_failpoint as failpoint;
use a3s_box_sys::{inherit, namespace};
use a3s_box_types::shim::{
    BoundaryConfig, CONFIG_FILE, LANES_FILE, Processes, SOCKET_FILE, ShimConfig, Start, fd,
};
use a3s_box_volume::{Orders, Share};
use anyhow::Context;
use rustix::mount::{MountPropagationFlags, mount_change};
use std::{
    fs::{self, File},
    io::Write,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{net::UnixListener, sync::watch};
use tokio_stream::wrappers::UnixListenerStream;

/// The share's folder in the state folder.
const SHARE_DIR: &str = "share";
/// So long clients may take to read their last answers after the shutdown.
const GOODBYE: Duration = Duration::from_secs(2);

/// Runs the sandbox that `folder` orders, to its shutdown.
pub fn run(folder: &Path) -> anyhow::Result<()> {
    let since = Instant::now();
    let ready = inherit::take(fd::READY).context("the ready pipe")?;
    let mut ready = File::from(ready);
    let outcome = start(folder, since, &mut ready);
    if let Err(err) = &outcome {
        // The server may be gone; then the log alone has it.
        writeln!(ready, "error: {err:#}").ok();
    }
    outcome
}

fn start(folder: &Path, since: Instant, ready: &mut File) -> anyhow::Result<()> {
    let file = folder.join(CONFIG_FILE);
    let text = fs::read(&file).with_context(|| format!("read {}", file.display()))?;
    let config: ShimConfig =
        serde_json::from_slice(&text).with_context(|| format!("read {}", file.display()))?;
    let processes = Processes::new(records::process(std::process::id())?);
    records::save_processes(folder, &processes).context("save the process list")?;
    failpoint::hit("shim-listed");
    let (parts, share) = parts(folder, &config)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let boundary = Handle::start(parts, folder.to_owned(), processes, since);
        serve(folder, config, boundary, share, since, ready).await
    })
}

/// What the boundary is made of, with this process in a mount namespace of its own.
fn parts(folder: &Path, config: &ShimConfig) -> anyhow::Result<(Parts, PodShare)> {
    let sandbox = config.sandbox_id.clone();
    match &config.boundary {
        BoundaryConfig::Microvm(config) => {
            let tap = inherit::take(fd::TAP).context("the tap")?;
            let template_ram = match config.vm.start {
                Start::Clone { .. } => {
                    Some(inherit::take(fd::TEMPLATE_RAM).context("the template's memory")?)
                }
                Start::Boot { .. } => None,
            };
            let mounts = host_mounts()?;
            own_mounts()?;
            let share = Share::create(&folder.join(SHARE_DIR)).context("make the share")?;
            let share_root = share.root().to_owned();
            let (ours, orders) = UnixStream::pair().context("make the volume server's orders")?;
            let ours = Arc::new(Orders::new(ours));
            let guest_mounts = GuestMounts::new(mounts, ours.clone(), sandbox);
            let config = config.clone();
            let parts = microvm::Parts { config, share_root, orders, tap, template_ram };
            Ok((Parts::Microvm(parts), PodShare::of_guest(share, ours, guest_mounts)))
        }
        BoundaryConfig::Host(config) => {
            let netns = config.own_network.then(|| inherit::take(fd::NETNS)).transpose();
            let netns = netns.context("the pod's network namespace")?;
            let cgroup = host::cgroup(&config.cgroup)?;
            let mounts = host_mounts()?;
            own_mounts()?;
            let config = config.clone();
            let parts = host::Parts { config, cgroup, netns, mounts };
            Ok((Parts::Host(parts), PodShare::Host))
        }
    }
}

/// The host's mount namespace, as long as this process is in it.
fn host_mounts() -> anyhow::Result<OwnedFd> {
    let mounts = File::open("/proc/self/ns/mnt").context("the host's mount namespace")?;
    Ok(mounts.into())
}

/// Mounts of the host still arrive here; none of ours reaches the host.
fn own_mounts() -> anyhow::Result<()> {
    namespace::unshare_mount().context("leave the mount namespace")?;
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .context("stop sharing mounts with the host")
}

async fn serve(
    folder: &Path,
    config: ShimConfig,
    boundary: Handle,
    share: PodShare,
    since: Instant,
    ready: &mut File,
) -> anyhow::Result<()> {
    let listener = listen(folder, SOCKET_FILE).context("listen on the shim's socket")?;
    let lanes = listen(folder, LANES_FILE).context("listen on the lanes' socket")?;
    let (stop, mut stopped) = watch::channel(false);
    let shim = Arc::new(Shim::new(folder, config, boundary, share, since, stop));
    tokio::spawn(service::follow(shim.clone()));
    tokio::spawn(service::lend_lanes(shim.clone(), lanes));
    failpoint::hit("shim-listening");
    ready.write_all(b"ready\n").context("tell the server")?;
    // The server reads to the end of the file.
    *ready = File::open("/dev/null")?;
    let service = ShimServer::new(Service(shim))
        .max_decoding_message_size(service::MESSAGE_MAX)
        .max_encoding_message_size(service::MESSAGE_MAX);
    let mut ending = stopped.clone();
    let serving = tonic::transport::Server::builder()
        .initial_stream_window_size(CALL_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .add_service(service)
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async move {
            stopped.wait_for(|stop| *stop).await.ok();
        });
    let patience = async move {
        ending.wait_for(|stop| *stop).await.ok();
        tokio::time::sleep(GOODBYE).await;
    };
    tokio::select! {
        served = serving => served.context("serve the shim's socket"),
        // A client that is stuck must not keep the shim of a sandbox that has ended.
        () = patience => Ok(()),
    }
}

/// Binds through the folder's descriptor: a path of any length fits.
fn listen(folder: &Path, name: &str) -> std::io::Result<UnixListener> {
    let directory: OwnedFd = File::open(folder)?.into();
    UnixListener::bind(format!("/proc/self/fd/{}/{name}", directory.as_raw_fd()))
}
