//! What folders hold: finding, making, renaming and removing, and listing.

use super::attributes::{ENTRY_OUT, split_device};
use super::contents::open_flags;
use super::handles::Handle;
use super::message::{Answer, Reply, Request};
use super::nodes::Node;
use super::worker::Worker;
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, RenameFlags, SeekFrom, Statx};
use rustix::io::Errno;
use rustix::path::DecInt;
use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::sync::{Mutex, PoisonError};

/// Bytes of a folder that are read at once.
const LISTING: usize = 8 << 10;

impl Worker<'_> {
    pub fn lookup(&self, request: &Request<'_>, reply: &mut Reply) -> Answer {
        let name = request.arguments().name()?;
        let parent = self.node(request)?;
        let updates = self.files.updates.as_ref();
        if let Some(link) = updates.map_or(Ok(None), |all| all.stand_in(&parent, name))? {
            let (number, node, stat) = self.files.nodes.insert_double(&parent, link)?;
            return self.entry(reply, number, &node, &stat);
        }
        self.found(&parent, name, reply)
    }

    /// Answers with the entry `name` of `parent`.
    fn found(&self, parent: &Node, name: &CStr, reply: &mut Reply) -> Answer {
        let (number, node, stat) = self.files.nodes.lookup(parent, name)?;
        self.entry(reply, number, &node, &stat)
    }

    fn entry(&self, reply: &mut Reply, number: u64, node: &Node, stat: &Statx) -> Answer {
        let seconds = self.files.nodes.seconds(node);
        self.files.numbers.entry_out(reply, number, stat, seconds)
    }

    pub fn mkdir(&self, request: &Request<'_>, reply: &mut Reply) -> Answer {
        let mut arguments = request.arguments();
        let mode = permissions(arguments.u32()?);
        arguments.u32()?; // the umask, already applied
        let name = arguments.name()?;
        let parent = self.writable(request.node)?;
        self.files.nodes.check_room()?;
        rustix::fs::mkdirat(&parent.fd, name, mode)?;
        self.found(&parent, name, reply)
    }

    pub fn mknod(&self, request: &Request<'_>, reply: &mut Reply) -> Answer {
        let mut arguments = request.arguments();
        let mode = arguments.u32()?;
        let (major, minor) = split_device(arguments.u32()?);
        arguments.u64()?; // the umask, already applied; padding
        let name = arguments.name()?;
        let kind = FileType::from_raw_mode(mode);
        let allowed = match kind {
            FileType::RegularFile | FileType::Fifo | FileType::Socket => true,
            // What overlayfs calls a whiteout. Other devices would be the host's.
            FileType::CharacterDevice => (major, minor) == (0, 0),
            _ => false,
        };
        if !allowed {
            return Err(Errno::PERM);
        }
        let parent = self.writable(request.node)?;
        self.files.nodes.check_room()?;
        rustix::fs::mknodat(&parent.fd, name, kind, permissions(mode), 0)?;
        self.found(&parent, name, reply)
    }

    pub fn symlink(&self, request: &Request<'_>, reply: &mut Reply) -> Answer {
        let mut arguments = request.arguments();
        let name = arguments.name()?;
        let target = arguments.string()?;
        let parent = self.writable(request.node)?;
        self.files.nodes.check_room()?;
        rustix::fs::symlinkat(target, &parent.fd, name)?;
        self.found(&parent, name, reply)
    }

    pub fn link(&self, request: &Request<'_>, reply: &mut Reply) -> Answer {
        let mut arguments = request.arguments();
        let source = self.files.nodes.get(arguments.u64()?)?;
        let name = arguments.name()?;
        source.check_writable()?;
        let parent = self.writable(request.node)?;
        let path = DecInt::new(source.fd.as_raw_fd());
        // The link to follow is the one in /proc, never the guest's.
        let flags = AtFlags::SYMLINK_FOLLOW;
        rustix::fs::linkat(&self.files.descriptors, path, &parent.fd, name, flags)?;
        self.found(&parent, name, reply)
    }

    pub fn unlink(&self, request: &Request<'_>, flags: AtFlags) -> Answer {
        let name = request.arguments().name()?;
        let parent = self.writable(request.node)?;
        match rustix::fs::unlinkat(&parent.fd, name, flags) {
            Err(Errno::BUSY) if self.files.nodes.held().wait(&parent, name)? => {
                rustix::fs::unlinkat(&parent.fd, name, flags)
            }
            done => done,
        }
    }

    pub fn rename(&self, request: &Request<'_>, with_flags: bool) -> Answer {
        let mut arguments = request.arguments();
        let new_parent = self.files.nodes.get(arguments.u64()?)?;
        let flags = if with_flags {
            let bits = arguments.u64()? as u32; // the other half is padding
            let known = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE | RenameFlags::WHITEOUT;
            RenameFlags::from_bits(bits)
                .filter(|flags| known.contains(*flags))
                .ok_or(Errno::INVAL)?
        } else {
            RenameFlags::empty()
        };
        let (name, new_name) = (arguments.name()?, arguments.name()?);
        let parent = self.node(request)?;
        if let Some(updates) = &self.files.updates
            && updates.renamed((&parent, name), (&new_parent, new_name))?
        {
            return Ok(());
        }
        parent.check_writable()?;
        new_parent.check_writable()?;
        rustix::fs::renameat_with(&parent.fd, name, &new_parent.fd, new_name, flags)
    }

    pub fn create(&self, request: &Request<'_>, reply: &mut Reply) -> Answer {
        let mut arguments = request.arguments();
        let flags = arguments.u32()?;
        let mode = permissions(arguments.u32()?);
        arguments.u32()?; // the umask, already applied
        let open_in = arguments.u32()?;
        let name = arguments.name()?;
        let parent = self.writable(request.node)?;
        self.files.nodes.check_room()?;
        self.files.handles.check_room()?;
        // Only what is new is opened by name: what is there already may be anything.
        let new = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(&parent.fd, name, open_flags(flags) | new, mode) {
            Ok(file) => self.created(&parent, file, flags, reply),
            Err(Errno::EXIST) if flags & OFlags::EXCL.bits() == 0 => {
                let (number, node, stat) = self.files.nodes.lookup(&parent, name)?;
                let result = self.open_node(&node, flags, open_in);
                if result.is_err() {
                    self.files.nodes.forget(number, 1);
                }
                let (handle, open_out) = result?;
                self.entry(reply, number, &node, &stat)?;
                reply.u64(handle)?;
                reply.u64(u64::from(open_out))
            }
            Err(error) => Err(super::nodes::no_room(error)),
        }
    }

    pub fn tmpfile(&self, request: &Request<'_>, reply: &mut Reply) -> Answer {
        let mut arguments = request.arguments();
        let flags = arguments.u32()?;
        let mode = permissions(arguments.u32()?);
        let parent = self.writable(request.node)?;
        self.files.nodes.check_room()?;
        self.files.handles.check_room()?;
        let new = OFlags::TMPFILE | OFlags::CLOEXEC;
        let keep_unnamed = OFlags::from_bits_retain(flags & OFlags::EXCL.bits());
        let file =
            rustix::fs::openat(&parent.fd, ".", open_flags(flags) | new | keep_unnamed, mode)
                .map_err(super::nodes::no_room)?;
        self.created(&parent, file, flags, reply)
    }

    /// Answers with the entry and the handle of a new file.
    fn created(&self, parent: &Node, file: OwnedFd, flags: u32, reply: &mut Reply) -> Answer {
        let path = self.reopen(&file, OFlags::PATH)?;
        let (number, node, stat) = self.files.nodes.insert_child(parent, path)?;
        let open_out = self.open_out(&node, flags);
        let handle = self.files.handles.insert(Handle::File(file));
        self.entry(reply, number, &node, &stat)?;
        reply.u64(handle)?;
        reply.u64(u64::from(open_out))
    }

    pub fn readlink(&self, request: &Request<'_>, reply: &mut Reply) -> Answer {
        let node = self.node(request)?;
        let target = rustix::fs::readlinkat(&node.fd, "", Vec::new())?;
        reply.bytes(target.to_bytes())
    }

    pub fn opendir(&self, request: &Request<'_>, reply: &mut Reply) -> Answer {
        let node = self.node(request)?;
        self.files.handles.check_room()?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&node.fd, ".", flags, Mode::empty())
            .map_err(super::nodes::no_room)?;
        let position = Mutex::new(0);
        let handle = Handle::Folder { node, fd, position };
        reply.u64(self.files.handles.insert(handle))?;
        reply.u64(0)
    }

    pub fn readdir(&self, request: &Request<'_>, reply: &mut Reply, plus: bool) -> Answer {
        let mut arguments = request.arguments();
        let handle = self.files.handles.get(arguments.u64()?)?;
        let offset = arguments.u64()?;
        let size = arguments.u32()? as usize;
        reply.room(size)?; // refuses sizes beyond what was agreed on
        let Handle::Folder { node, fd, position } = &*handle else {
            return Err(Errno::NOTDIR);
        };
        let stat = node.stat()?;
        let device = (stat.stx_dev_major, stat.stx_dev_minor);
        let mut position = position.lock().unwrap_or_else(PoisonError::into_inner);
        if *position != offset {
            rustix::fs::seek(fd, SeekFrom::Start(offset))?;
        }
        // Not known again before the whole listing has gone well.
        *position = u64::MAX;
        let mut buffer = [MaybeUninit::uninit(); LISTING];
        // About as much as will fit in the answer: what does not is read a second time.
        let share = if plus { size / 4 } else { size };
        let mut entries = RawDir::new(fd, &mut buffer[..share.clamp(512, LISTING)]);
        let mut next = offset;
        loop {
            if entries.is_buffer_empty() && reply.len() > 0 {
                // A further read would go beyond what is reported as the position.
                *position = next;
                return Ok(());
            }
            let Some(entry) = entries.next() else {
                *position = next;
                return Ok(());
            };
            let entry = entry?;
            let before = reply.len();
            let number = self.files.numbers.number(device, entry.ino());
            let name = entry.file_name();
            let after = entry.next_entry_cookie();
            let padded = 24 + name.count_bytes().next_multiple_of(8);
            let length = padded + if plus { ENTRY_OUT } else { 0 };
            if before + length > size {
                return Ok(());
            }
            if plus {
                self.entry_of_listing(node, name, reply)?;
            }
            reply.u64(number)?;
            reply.u64(after)?;
            reply.u32(name.count_bytes() as u32)?;
            reply.u32(match entry.file_type() {
                FileType::Unknown => 0,
                kind => kind.as_raw_mode() >> 12,
            })?;
            reply.bytes(name.to_bytes())?;
            const PADDING: [u8; 8] = [0; 8];
            reply.bytes(&PADDING[..before + length - reply.len()])?;
            next = after;
        }
    }

    /// The entry before a name of READDIRPLUS; node 0 says that nothing is known about it.
    fn entry_of_listing(&self, folder: &Node, name: &CStr, reply: &mut Reply) -> Answer {
        let before = reply.len();
        let dots = matches!(name.to_bytes(), b"." | b"..");
        if dots || self.found(folder, name, reply).is_err() {
            reply.truncate(before);
            reply.bytes(&[0; ENTRY_OUT])?;
        }
        Ok(())
    }
}

/// Permission bits of a mode.
pub fn permissions(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & 0o7777)
}
