//! TAP interfaces: a network card whose cable ends in a descriptor.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
};

/// Creates the TAP interface `name` in the calling thread's network namespace: whole Ethernet
/// frames, each behind a virtio-net header. It goes when the descriptor is closed.
///
/// # Errors
/// What opening /dev/net/tun or TUNSETIFF said; InvalidInput for a name over 15 bytes.
pub fn create(name: &str) -> io::Result<OwnedFd> {
    let file: File = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")?;
    // SAFETY: ifreq is plain data; all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the descriptor is open and TUNSETIFF takes a pointer to an ifreq.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw const request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tap_lives_as_long_as_its_descriptor() {
        std::thread::spawn(|| {
            crate::namespace::unshare_network().unwrap();
            let exists = || {
                let cards = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
                cards.contains("tap0:")
            };
            let tap = create("tap0").unwrap();
            assert!(exists());
            drop(tap);
            assert!(!exists());
            assert!(create("a-name-that-is-too-long").is_err());
        })
        .join()
        .unwrap();
    }
}
