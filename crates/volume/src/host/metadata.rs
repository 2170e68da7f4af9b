//! All about files: attributes, extended attributes, file systems.

use super::message::{Answer, Reply, Request};
use super::names::permissions;
use super::nodes::Node;
use super::worker::Worker;
use rustix::fd::AsRawFd;
use rustix::fs::{AtFlags, FileType, Gid, OFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;
use rustix::path::DecInt;

/// Which fields of `struct fuse_setattr_in` count.
mod set {
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const HANDLE: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
    pub const KILL_SUIDGID: u32 = 1 << 11;
}

/// Largest value of an extended attribute, and of their list.
const MAX_XATTR: usize = 64 << 10;

impl Worker<'_> {
    pub fn getattr(&self, request: &Request<'_>, reply: &mut Reply) -> Answer {
        let node = self.node(request)?;
        self.attributes(&node, reply)
    }

    fn attributes(&self, node: &Node, reply: &mut Reply) -> Answer {
        let seconds = self.files.nodes.seconds(node);
        self.files.numbers.attr_out(reply, &node.stat()?, seconds)
    }

    pub fn setattr(&self, request: &Request<'_>, reply: &mut Reply) -> Answer {
        let mut arguments = request.arguments();
        let valid = arguments.u32()?;
        arguments.u32()?; // padding
        let handle = arguments.u64()?;
        let size = arguments.u64()?;
        arguments.u64()?; // owner of a lock
        let (atime, mtime, _ctime) = (arguments.u64()?, arguments.u64()?, arguments.u64()?);
        let (atime_nanos, mtime_nanos) = (arguments.u32()?, arguments.u32()?);
        arguments.u32()?; // nanoseconds of ctime
        let mode = arguments.u32()?;
        arguments.u32()?; // unused
        let (uid, gid) = (arguments.u32()?, arguments.u32()?);

        let node = self.writable(request.node)?;
        // Before the mode: a change of owner takes bits of it away.
        if valid & (set::UID | set::GID) != 0 {
            let uid = (valid & set::UID != 0).then(|| Uid::from_raw(uid));
            let gid = (valid & set::GID != 0).then(|| Gid::from_raw(gid));
            rustix::fs::chownat(&node.fd, "", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        if valid & set::MODE != 0 {
            let path = DecInt::new(node.fd.as_raw_fd());
            let mode = permissions(mode);
            rustix::fs::chmodat(&self.files.descriptors, path, mode, AtFlags::empty())?;
        }
        if valid & set::SIZE != 0 {
            let kill = valid & set::KILL_SUIDGID != 0;
            let handle = (valid & set::HANDLE != 0).then_some(handle);
            self.without_fsetid(kill, || self.truncate(&node, handle, size))?;
        }
        if valid & (set::ATIME | set::MTIME) != 0 {
            let time = |given, now, seconds: u64, nanos: u32| Timespec {
                tv_sec: seconds as i64,
                tv_nsec: match (valid & given, valid & now) {
                    (0, _) => rustix::fs::UTIME_OMIT,
                    (_, 0) => nanos.into(),
                    _ => rustix::fs::UTIME_NOW,
                },
            };
            let times = Timestamps {
                last_access: time(set::ATIME, set::ATIME_NOW, atime, atime_nanos),
                last_modification: time(set::MTIME, set::MTIME_NOW, mtime, mtime_nanos),
            };
            rustix::fs::utimensat(&node.fd, "", &times, AtFlags::EMPTY_PATH)?;
        }
        self.attributes(&node, reply)
    }

    fn truncate(&self, node: &Node, handle: Option<u64>, size: u64) -> Answer {
        match handle {
            Some(handle) => rustix::fs::ftruncate(self.files.handles.get(handle)?.file()?, size),
            None => rustix::fs::ftruncate(self.reopen_file(node, OFlags::WRONLY)?, size),
        }
    }

    pub fn statfs(&self, request: &Request<'_>, reply: &mut Reply) -> Answer {
        let stat = rustix::fs::fstatvfs(&self.node(request)?.fd)?;
        for number in [stat.f_blocks, stat.f_bfree, stat.f_bavail, stat.f_files, stat.f_ffree] {
            reply.u64(number)?;
        }
        for number in [stat.f_bsize, stat.f_namemax, stat.f_frsize] {
            reply.u32(number as u32)?;
        }
        reply.bytes(&[0; 28])
    }

    pub fn setxattr(&self, request: &Request<'_>) -> Answer {
        let mut arguments = request.arguments();
        let size = arguments.u32()? as usize;
        let flags = XattrFlags::from_bits(arguments.u32()?).ok_or(Errno::INVAL)?;
        let name = arguments.string()?;
        let value = arguments.bytes(size)?;
        let node = self.writable(request.node)?;
        rustix::fs::setxattr(path(&node)?, name, value, flags)
    }

    pub fn getxattr(&self, request: &Request<'_>, reply: &mut Reply) -> Answer {
        let mut arguments = request.arguments();
        let size = arguments.u64()? as u32 as usize; // the other half is padding
        let name = arguments.string()?;
        let path = path(&*self.node(request)?)?;
        answer_sized(reply, size, |room| rustix::fs::getxattr(path, name, room))
    }

    pub fn listxattr(&self, request: &Request<'_>, reply: &mut Reply) -> Answer {
        let size = request.arguments().u64()? as u32 as usize; // the other half is padding
        let path = path(&*self.node(request)?)?;
        answer_sized(reply, size, |room| rustix::fs::listxattr(path, room))
    }

    pub fn removexattr(&self, request: &Request<'_>) -> Answer {
        let name = request.arguments().string()?;
        let node = self.writable(request.node)?;
        rustix::fs::removexattr(path(&node)?, name)
    }
}

/// The node's name in the working directory, for calls that take no O_PATH descriptor. Following
/// it ends at the node itself.
fn path(node: &Node) -> Answer<DecInt> {
    match node.kind {
        // Only these can have extended attributes that an unprivileged owner may set.
        FileType::RegularFile | FileType::Directory => Ok(DecInt::new(node.fd.as_raw_fd())),
        _ => Err(Errno::NOTSUP),
    }
}

/// Answers with what `get` writes; with its size when the guest asks with size 0.
fn answer_sized(
    reply: &mut Reply,
    size: usize,
    get: impl FnOnce(&mut [u8]) -> Answer<usize>,
) -> Answer {
    if size == 0 {
        let size = get(&mut [])?;
        return reply.u64(size as u64); // and padding
    }
    let count = get(reply.room(size.min(MAX_XATTR))?)?;
    reply.took(count);
    Ok(())
}
