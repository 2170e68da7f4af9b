//! `a3s-box-shim volume-server`: the share's server, and how a shim starts it.

use crate::child::WatchedChild;
use a3s_box_sys::{inherit, spawn::Spawn};
use a3s_box_volume::Owner;
use anyhow::Context;
use rustix::process::Signal;
use std::{
    fs, io,
    os::{fd::AsFd, unix::net::UnixStream},
    path::Path,
};

/// The stream to the guest, among the descriptors it inherits.
const STREAM: i32 = 3;
/// The shim's orders, likewise.
const ORDERS: i32 = 4;

/// Serves the share at `root` until the guest hangs up. `init` is a file with the FUSE_INIT that the
/// guest's template was answered.
/// `charged` is the user who pays for watching volumes.
pub fn run(root: &Path, charged: &str, init: Option<&Path>) -> anyhow::Result<()> {
    let charged = charged.parse().with_context(|| format!("{charged:?} is no user id"))?;
    let stream = UnixStream::from(inherit::take(STREAM).context("the stream to the guest")?);
    let orders = UnixStream::from(inherit::take(ORDERS).context("the shim's orders")?);
    let init = init
        .map(|file| fs::read(file).with_context(|| format!("read {}", file.display())))
        .transpose()?;
    Ok(a3s_box_volume::serve(root, stream, init, Some(Owner { orders, charged }))?)
}

/// Starts a volume server of this shim on the share at `root`. It dies with the shim.
pub fn start(
    root: &Path,
    stream: UnixStream,
    owner: Owner,
    init: Option<&Path>,
) -> io::Result<WatchedChild> {
    let mut server = Spawn::new("/proc/self/exe");
    server.arg("volume-server").arg(root).arg(owner.charged.to_string());
    if let Some(init) = init {
        server.arg(init);
    }
    server.fd(stream, STREAM).fd(owner.orders, ORDERS);
    server.output = Some(io::stderr().as_fd().try_clone_to_owned()?);
    server.death_signal = Some(Signal::KILL.as_raw());
    WatchedChild::start(server)
}
