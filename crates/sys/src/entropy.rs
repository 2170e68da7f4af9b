//! Credits the kernel's random pool with bytes from outside and makes it use them at once.

use rustix::fd::{AsFd, AsRawFd};
use std::{fs::File, io};

const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
/// The kernel's pool holds 256 bits; a longer seed is mixed in all the same.
const LONGEST: usize = 512;

#[repr(C)]
struct PoolInfo {
    entropy_count: libc::c_int,
    buf_size: libc::c_int,
    buf: [u8; LONGEST],
}

/// Mixes `seed` in, counts each byte as eight bits of entropy, and reseeds the generator.
pub fn add(seed: &[u8]) -> io::Result<()> {
    let seed = &seed[..seed.len().min(LONGEST)];
    let length = seed.len() as libc::c_int;
    let mut info = PoolInfo { entropy_count: length * 8, buf_size: length, buf: [0; LONGEST] };
    info.buf[..seed.len()].copy_from_slice(seed);
    let random = File::options().write(true).open("/dev/urandom")?;
    let fd = random.as_fd().as_raw_fd();
    // SAFETY: info is laid out as struct rand_pool_info and holds buf_size bytes.
    if unsafe { libc::ioctl(fd, RNDADDENTROPY, &raw const info) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: takes no argument.
    if unsafe { libc::ioctl(fd, RNDRESEEDCRNG) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
