//! The virtual machine's cable: a TAP interface in the pod's namespace.

use crate::{NetError, netns};
use std::{fs, os::fd::OwnedFd, path::Path};

/// The interface's name, in every namespace.
pub const NAME: &str = "tap0";

/// Makes the TAP interface; its descriptor is the virtual machine's card and the interface's life.
pub fn create(netns: &Path) -> Result<OwnedFd, NetError> {
    netns::inside(netns, || {
        let tap = a3s_box_sys::tap::create(NAME)?;
        // The host's kernel must not speak on the guest's cable. Absent where IPv6 is.
        let quiet = format!("/proc/sys/net/ipv6/conf/{NAME}/disable_ipv6");
        if Path::new(&quiet).exists() {
            fs::write(quiet, "1")?;
        }
        Ok(tap)
    })
    .map_err(NetError::io("make the tap in", netns))
}
