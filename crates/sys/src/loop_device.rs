//! Loop devices: a file as a block device, for kernels that cannot mount the file itself.

use std::{
    fs::File,
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

const CONTROL: &str = "/dev/loop-control";
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4c82;
const LOOP_CONFIGURE: libc::c_ulong = 0x4c0a;
const READ_ONLY: u32 = 1;
const AUTOCLEAR: u32 = 4;
/// Others take devices, too: more failures in a row mean something else.
const TRIES: usize = 64;

/// struct loop_info64.
#[repr(C)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    names: [u8; 160],
    init: [u64; 2],
}

/// struct loop_config.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

/// A loop device. It stays the file's until it is dropped and nothing is mounted from it.
#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
    _device: File,
}

impl LoopDevice {
    /// A free device, made read-only the file's.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn attach(file: &File) -> io::Result<Self> {
        let control = File::options().read(true).write(true).open(CONTROL)?;
        let mut tries = 0;
        loop {
            tries += 1;
            // SAFETY: the call takes no argument.
            let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
            if number < 0 {
                return Err(io::Error::last_os_error());
            }
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device = File::options().read(true).open(&path)?;
            match configure(&device, file) {
                // Somebody was faster.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) && tries < TRIES => {}
                Err(error) => return Err(error),
                Ok(()) => return Ok(Self { path, _device: device }),
            }
        }
    }

    /// Its node.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn configure(device: &File, file: &File) -> io::Result<()> {
    // SAFETY: plain numbers and arrays of them, for which all zeroes is valid.
    let mut config: Config = unsafe { std::mem::zeroed() };
    config.fd = file.as_raw_fd() as u32;
    config.info.flags = READ_ONLY | AUTOCLEAR;
    // SAFETY: the kernel reads one struct loop_config, which lives through the call.
    match unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, io::Read, os::unix::fs::FileExt};

    #[test]
    fn a_files_content_is_a_devices_until_it_is_dropped() {
        if !Path::new(CONTROL).exists() {
            return; // a machine without loop devices: nothing to prove
        }
        let file = crate::memfd::create("a3s-box-loop-test").unwrap();
        file.write_all_at(&[7; 4096], 0).unwrap();
        let device = LoopDevice::attach(&file).unwrap();
        let mut content = Vec::new();
        File::open(device.path()).unwrap().read_to_end(&mut content).unwrap();
        assert_eq!(content, [7; 4096]);
        let name = device.path().file_name().unwrap().to_owned();
        drop(device);
        let backing = Path::new("/sys/block").join(name).join("loop/backing_file");
        let gone =
            || !fs::read_to_string(&backing).is_ok_and(|file| file.contains("a3s-box-loop-test"));
        // Others may be looking at the device for a moment.
        assert!((0..100_000).any(|_| {
            std::thread::yield_now();
            gone()
        }));
    }
}
