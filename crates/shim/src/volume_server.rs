//! `a3s-box-shim volume-server`: the share's server, and how a shim starts it.

use a3s_box_sys::{inherit, pidfd, spawn::Spawn, watch::watch};
use anyhow::Context;
use rustix::process::Signal;
use std::{
    fs, io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    process::Child,
};
use tokio::io::{Interest, unix::AsyncFd};

/// The stream to the guest, among the descriptors it inherits.
const STREAM: i32 = 3;

/// Serves the share at `root` until the guest hangs up. `init` is a file with the FUSE_INIT that the
/// guest's template was answered.
pub fn run(root: &Path, init: Option<&Path>) -> anyhow::Result<()> {
    let stream = UnixStream::from(inherit::take(STREAM).context("the stream to the guest")?);
    let init = init
        .map(|file| fs::read(file).with_context(|| format!("read {}", file.display())))
        .transpose()?;
    Ok(a3s_box_volume::serve(root, stream, init)?)
}

/// A volume server of this shim. It dies with the shim.
#[derive(Debug)]
pub struct VolumeServer {
    child: Child,
    process: AsyncFd<OwnedFd>,
}

impl VolumeServer {
    /// Starts it on the share at `root`.
    pub fn start(root: &Path, stream: UnixStream, init: Option<&Path>) -> io::Result<Self> {
        let mut server = Spawn::new("/proc/self/exe");
        server.arg("volume-server").arg(root);
        if let Some(init) = init {
            server.arg(init);
        }
        server.fd(stream, STREAM);
        server.output = Some(io::stderr().as_fd_owned()?);
        server.death_signal = Some(Signal::KILL.as_raw());
        let mut child = server.start()?;
        let process = pidfd::of_child(&child).and_then(|fd| watch(fd, Interest::READABLE));
        match process {
            Ok(process) => Ok(Self { child, process }),
            Err(err) => {
                child.kill()?;
                child.wait()?;
                Err(err)
            }
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its end. Cancel safe.
    pub async fn wait(&mut self) -> String {
        if let Err(err) = self.process.readable().await {
            return format!("the volume server could not be watched: {err}");
        }
        match self.child.wait() {
            Ok(status) => format!("the volume server ended ({status}), see shim.log"),
            Err(err) => format!("the volume server could not be waited for: {err}"),
        }
    }
}

trait AsFdOwned {
    fn as_fd_owned(&self) -> io::Result<OwnedFd>;
}

impl AsFdOwned for io::Stderr {
    fn as_fd_owned(&self) -> io::Result<OwnedFd> {
        use std::os::fd::AsFd;
        self.as_fd().try_clone_to_owned()
    }
}
