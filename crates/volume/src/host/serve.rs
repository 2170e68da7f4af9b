//! The volume server's process.

use super::{Error, Result, init};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// The whole life of the volume server: shuts the process into the share at `root`, then serves it
/// on `stream` until the guest hangs up. `init` is the FUSE_INIT of a guest that was answered
/// already; without it, the guest begins with one.
pub fn serve(_root: &Path, _stream: UnixStream, init: Option<Vec<u8>>) -> Result<()> {
    if init.is_some_and(|init| init::answer(&init).is_none()) {
        return Err(Error::Protocol("the FUSE_INIT given is none"));
    }
    Err(Error::Protocol("serving is not built yet"))
}
