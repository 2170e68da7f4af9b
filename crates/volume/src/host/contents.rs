//! What files hold: opening, reading, writing, space.

use super::handles::Handle;
use super::message::{Answer, Reply, Request};
use super::nodes::{Node, Zone};
use super::worker::Worker;
use crate::wire::MAX_WRITE;
use rustix::fs::{FallocateFlags, OFlags, SeekFrom};
use rustix::io::{Errno, ReadWriteFlags};
use std::io::IoSlice;

const FOPEN_KEEP_CACHE: u32 = 1 << 1;
const FOPEN_NOFLUSH: u32 = 1 << 5;
const OPEN_KILL_SUIDGID: u32 = 1 << 0;
const WRITE_CACHE: u32 = 1 << 0;
const WRITE_KILL_SUIDGID: u32 = 1 << 2;
const FSYNC_DATA: u32 = 1 << 0;
/// A copy of more than this would keep other requests waiting; callers go on from where it ends.
const MAX_COPY: u64 = 64 << 20;

/// Flags of the guest's open that mean something here. Not O_APPEND: each write says so itself.
/// Not O_DIRECT: it bypasses the guest's cache, and the host's is everybody's.
pub fn open_flags(flags: u32) -> OFlags {
    let meant = OFlags::ACCMODE | OFlags::TRUNC | OFlags::SYNC | OFlags::DSYNC | OFlags::NOATIME;
    OFlags::from_bits_retain(flags) & meant
}

impl Worker<'_> {
    pub fn open(&self, request: &Request<'_>, reply: &mut Reply) -> Answer {
        let mut arguments = request.arguments();
        let (flags, open_in) = (arguments.u32()?, arguments.u32()?);
        let node = self.node(request)?;
        let (handle, open_out) = self.open_node(&node, flags, open_in)?;
        reply.u64(handle)?;
        reply.u64(u64::from(open_out))
    }

    /// Opens a regular file; returns its handle and what the guest is to know about it.
    pub fn open_node(&self, node: &Node, flags: u32, open_in: u32) -> Answer<(u64, u32)> {
        let wanted = open_flags(flags);
        if is_written(wanted) {
            node.check_writable()?;
        }
        self.files.handles.check_room()?;
        let kill = open_in & OPEN_KILL_SUIDGID != 0;
        let file = self.without_fsetid(kill, || self.reopen_file(node, wanted))?;
        let handle = self.files.handles.insert(Handle::File(file));
        Ok((handle, self.open_out(node, flags)))
    }

    /// FOPEN_*.
    pub fn open_out(&self, node: &Node, flags: u32) -> u32 {
        let mut out = 0;
        if node.zone == Zone::Image {
            out |= FOPEN_KEEP_CACHE;
        }
        if !is_written(open_flags(flags)) {
            out |= FOPEN_NOFLUSH;
        }
        out
    }

    pub fn read(&self, request: &Request<'_>, reply: &mut Reply) -> Answer {
        let mut arguments = request.arguments();
        let handle = self.files.handles.get(arguments.u64()?)?;
        let offset = arguments.u64()?;
        let size = arguments.u32()? as usize;
        if size > MAX_WRITE {
            return Err(Errno::INVAL);
        }
        let file = handle.file()?;
        let room = reply.room(size)?;
        let mut filled = 0;
        // A read that ends early means the file's end to the guest.
        while filled < size {
            match rustix::io::pread(file, &mut room[filled..], offset.saturating_add(filled as u64))
            {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(Errno::INTR) => {}
                Err(error) if filled == 0 => return Err(error),
                Err(_) => break,
            }
        }
        reply.took(filled);
        Ok(())
    }

    pub fn write(&self, request: &Request<'_>, reply: &mut Reply) -> Answer {
        let mut arguments = request.arguments();
        let handle = self.files.handles.get(arguments.u64()?)?;
        let offset = arguments.u64()?;
        let size = arguments.u32()? as usize;
        let write_flags = arguments.u32()?;
        arguments.u64()?; // owner of a lock
        let flags = OFlags::from_bits_retain(arguments.u32()?);
        arguments.u32()?; // padding
        let data = arguments.bytes(size)?;
        let file = handle.file()?;
        // The end of the file is where the host says it is. What comes from the guest's cache (a
        // mapping) has its place already.
        let append = flags.contains(OFlags::APPEND) && write_flags & WRITE_CACHE == 0;
        let how = if append { ReadWriteFlags::APPEND } else { ReadWriteFlags::empty() };
        let kill = write_flags & WRITE_KILL_SUIDGID != 0;
        let written = self.without_fsetid(kill, || {
            rustix::io::pwritev2(file, &[IoSlice::new(data)], offset, how)
        })?;
        reply.u64(written as u64) // and padding
    }

    pub fn release(&self, request: &Request<'_>) -> Answer {
        self.files.handles.remove(request.arguments().u64()?)
    }

    pub fn fsync(&self, request: &Request<'_>) -> Answer {
        let mut arguments = request.arguments();
        let handle = self.files.handles.get(arguments.u64()?)?;
        if arguments.u32()? & FSYNC_DATA != 0 {
            rustix::fs::fdatasync(handle.fd())
        } else {
            rustix::fs::fsync(handle.fd())
        }
    }

    /// One of the guest's descriptors of the file is closed. A network file system says only now
    /// that it could not store what was written.
    pub fn flush(&self, request: &Request<'_>) -> Answer {
        let handle = self.files.handles.get(request.arguments().u64()?)?;
        let again =
            rustix::io::fcntl_dupfd_cloexec(handle.file()?, 0).map_err(super::nodes::no_room)?;
        a3s_box_sys::close::close(again)
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }

    pub fn fallocate(&self, request: &Request<'_>) -> Answer {
        let mut arguments = request.arguments();
        let handle = self.files.handles.get(arguments.u64()?)?;
        let (offset, length) = (arguments.u64()?, arguments.u64()?);
        let mode = FallocateFlags::from_bits_retain(arguments.u32()?);
        rustix::fs::fallocate(handle.file()?, mode, offset, length)
    }

    pub fn lseek(&self, request: &Request<'_>, reply: &mut Reply) -> Answer {
        let mut arguments = request.arguments();
        let handle = self.files.handles.get(arguments.u64()?)?;
        let offset = arguments.u64()?;
        let position = match arguments.u32()? {
            3 => SeekFrom::Data(offset),
            4 => SeekFrom::Hole(offset),
            // The guest's kernel keeps positions itself.
            _ => return Err(Errno::INVAL),
        };
        reply.u64(rustix::fs::seek(handle.file()?, position)?)
    }

    pub fn copy_file_range(&self, request: &Request<'_>, reply: &mut Reply) -> Answer {
        let mut arguments = request.arguments();
        let from = self.files.handles.get(arguments.u64()?)?;
        let mut from_offset = arguments.u64()?;
        arguments.u64()?; // the other node
        let to = self.files.handles.get(arguments.u64()?)?;
        let mut to_offset = arguments.u64()?;
        let length = arguments.u64()?.min(MAX_COPY) as usize;
        if arguments.u64()? != 0 {
            return Err(Errno::INVAL);
        }
        let copied = rustix::fs::copy_file_range(
            from.file()?,
            Some(&mut from_offset),
            to.file()?,
            Some(&mut to_offset),
            length,
        )?;
        reply.u64(copied as u64) // and padding
    }
}

fn is_written(flags: OFlags) -> bool {
    !(flags & (OFlags::WRONLY | OFlags::RDWR | OFlags::TRUNC)).is_empty()
}
