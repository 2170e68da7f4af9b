//! `struct fuse_attr` and what contains it.

use super::message::{Answer, Reply};
use rustix::fs::Statx;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::sync::{Mutex, PoisonError};

/// Inode numbers as the guest sees them: unique over all of the share's file systems, because to
/// the guest they are one. Programs take two files of the same device and number for one.
pub struct Numbers {
    /// A device's place is the upper part of its inodes' numbers.
    devices: Mutex<Vec<(u32, u32)>>,
}

impl Numbers {
    const LOWER: u32 = 48;
    /// Bit 63 is for numbers that do not fit.
    const DEVICES: usize = 1 << 15;

    pub fn new() -> Self {
        Self { devices: Mutex::new(Vec::new()) }
    }

    pub fn number(&self, device: (u32, u32), inode: u64) -> u64 {
        let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        let place = devices.iter().position(|known| *known == device).or_else(|| {
            (devices.len() < Self::DEVICES).then(|| {
                devices.push(device);
                devices.len() - 1
            })
        });
        match place {
            Some(place) if inode >> Self::LOWER == 0 => (place as u64) << Self::LOWER | inode,
            _ => {
                let mut hasher = DefaultHasher::new();
                (device, inode).hash(&mut hasher);
                hasher.finish() | 1 << 63
            }
        }
    }

    /// `struct fuse_attr`.
    fn attributes(&self, reply: &mut Reply, stat: &Statx) -> Answer {
        let device = (stat.stx_dev_major, stat.stx_dev_minor);
        reply.u64(self.number(device, stat.stx_ino))?;
        reply.u64(stat.stx_size)?;
        reply.u64(stat.stx_blocks)?;
        let times = [stat.stx_atime, stat.stx_mtime, stat.stx_ctime];
        for time in times {
            reply.u64(time.tv_sec as u64)?;
        }
        for time in times {
            reply.u32(time.tv_nsec)?;
        }
        reply.u32(u32::from(stat.stx_mode))?;
        reply.u32(stat.stx_nlink)?;
        reply.u32(stat.stx_uid)?;
        reply.u32(stat.stx_gid)?;
        reply.u32(device_number(stat.stx_rdev_major, stat.stx_rdev_minor))?;
        reply.u32(stat.stx_blksize)?;
        reply.u32(0)
    }

    /// `struct fuse_attr_out`.
    pub fn attr_out(&self, reply: &mut Reply, stat: &Statx, seconds: u64) -> Answer {
        reply.u64(seconds)?;
        reply.u64(0)?; // nanoseconds, padding
        self.attributes(reply, stat)
    }

    /// `struct fuse_entry_out`.
    pub fn entry_out(&self, reply: &mut Reply, node: u64, stat: &Statx, seconds: u64) -> Answer {
        reply.u64(node)?;
        reply.u64(0)?; // generation: numbers are never used twice
        reply.u64(seconds)?; // the name
        reply.u64(seconds)?; // the attributes
        reply.u64(0)?; // nanoseconds of both
        self.attributes(reply, stat)
    }
}

/// Size of `struct fuse_entry_out`.
pub const ENTRY_OUT: usize = 128;

/// The kernel's 32-bit form.
fn device_number(major: u32, minor: u32) -> u32 {
    minor & 0xff | major << 8 | (minor & !0xff) << 12
}

/// The reverse.
pub fn split_device(number: u32) -> (u32, u32) {
    (number >> 8 & 0xfff, number & 0xff | number >> 12 & 0xfff00)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_inode_numbers_of_two_devices_differ() {
        let numbers = Numbers::new();
        let all: std::collections::HashSet<u64> = [(8, 1), (8, 2), (0, 40)]
            .into_iter()
            .flat_map(|device| [2, 1 << 50].map(|inode| numbers.number(device, inode)))
            .collect();
        assert_eq!(all.len(), 6);
        assert_eq!(numbers.number((8, 2), 2), numbers.number((8, 2), 2));
    }

    #[test]
    fn device_numbers_survive_both_ways() {
        for (major, minor) in [(0, 0), (1, 3), (8, 17), (259, 1048), (4095, 0xfffff)] {
            assert_eq!(split_device(device_number(major, minor)), (major, minor));
        }
    }
}
