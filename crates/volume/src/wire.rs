//! FUSE's messages, as far as both halves need them: numbers and sizes of the kernel's interface
//! (version 7), in the byte order of the machine, which guest and host share.

/// Largest read or write in one message.
pub const MAX_WRITE: usize = 1 << 20;
/// Largest message either way: the largest write or read and its headers, which fit in a page.
pub const MAX_MESSAGE: usize = MAX_WRITE + 4096;

/// `struct fuse_out_header`: length, error, unique.
pub const OUT_HEADER: usize = 16;
/// `struct fuse_in_header`: length, opcode, unique, node, uid, gid, pid, padding.
pub const IN_HEADER: usize = 40;

/// A notification that is not FUSE's: the guest is asked to rename [`REPLAYED`] to [`UPDATED`] in the
/// folder of the share whose path follows.
pub const REPLAY: i32 = 0x3a35;
/// The link to the version that is in force, in volumes that kubelet updates as a whole.
pub const UPDATED: &std::ffi::CStr = c"..data";
/// A name that kubelet does not use.
pub const REPLAYED: &std::ffi::CStr = c"..data_updated";

/// False for opcodes that have no answer, or whose answer nobody waits for.
pub fn is_answered(opcode: u32) -> bool {
    use opcode::{BATCH_FORGET, DESTROY, FORGET, INTERRUPT, NOTIFY_REPLY};
    !matches!(opcode, FORGET | BATCH_FORGET | INTERRUPT | NOTIFY_REPLY | DESTROY)
}

/// The number at `at`; 0 when the bytes end before it.
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

/// The number at `at`; 0 when the bytes end before it.
pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_ne_bytes)
}

/// `struct fuse_out_header`.
pub fn out_header(length: usize, error: i32, unique: u64) -> [u8; OUT_HEADER] {
    let mut header = [0; OUT_HEADER];
    header[0..4].copy_from_slice(&(length as u32).to_ne_bytes());
    header[4..8].copy_from_slice(&error.to_ne_bytes());
    header[8..16].copy_from_slice(&unique.to_ne_bytes());
    header
}

/// `enum fuse_opcode`.
#[allow(dead_code)] // each half uses its part
pub mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const IOCTL: u32 = 39;
    pub const NOTIFY_REPLY: u32 = 41;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const SYNCFS: u32 = 50;
    pub const TMPFILE: u32 = 51;
}
