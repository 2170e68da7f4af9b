//! One thread of the server: which operation a request is, and as whom it runs.
//!
//! The operations themselves: `names` (what folders hold), `contents` (what files hold),
//! `metadata` (all about them).

use super::attributes::Numbers;
use super::handles::Handles;
use super::message::{Answer, Reply, Request};
use super::nodes::{Node, Nodes};
use super::updates::Updates;
use crate::wire::opcode;
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::path::DecInt;
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
use std::sync::Arc;

/// What the threads share.
pub struct Files {
    pub nodes: Nodes,
    pub handles: Handles,
    pub numbers: Numbers,
    /// Of volumes that kubelet updates, where somebody says which these are.
    pub updates: Option<Updates>,
    /// This process's `/proc/self/fd`, and nothing else of procfs: turns an O_PATH descriptor into
    /// one that can be read. It is also the working directory, for system calls that want a path.
    pub descriptors: OwnedFd,
}

/// Capabilities of the server: to act on files as any user. Without CAP_MKNOD no device node
/// comes into being on the host, without CAP_DAC_READ_SEARCH no file is opened by a made-up handle.
pub const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETFCAP);

/// One thread.
pub struct Worker<'a> {
    pub files: &'a Files,
    caller: (u32, u32),
}

impl<'a> Worker<'a> {
    pub fn new(files: &'a Files) -> Self {
        Self { files, caller: (0, 0) }
    }

    /// Does what `request` asks for. `None`: there is no answer to it.
    pub fn handle<'r>(&mut self, request: &Request<'_>, reply: &'r mut Reply) -> Option<&'r [u8]> {
        reply.clear();
        let answer = match request.opcode {
            opcode::FORGET => return self.forget(request),
            opcode::BATCH_FORGET => return self.batch_forget(request),
            opcode::INTERRUPT | opcode::NOTIFY_REPLY => return None,
            _ => self.act_as(request.uid, request.gid).and_then(|()| self.operate(request, reply)),
        };
        Some(reply.finish(request.unique, answer))
    }

    fn operate(&self, request: &Request<'_>, reply: &mut Reply) -> Answer {
        match request.opcode {
            opcode::LOOKUP => self.lookup(request, reply),
            opcode::GETATTR => self.getattr(request, reply),
            opcode::SETATTR => self.setattr(request, reply),
            opcode::READLINK => self.readlink(request, reply),
            opcode::SYMLINK => self.symlink(request, reply),
            opcode::MKNOD => self.mknod(request, reply),
            opcode::MKDIR => self.mkdir(request, reply),
            opcode::UNLINK => self.unlink(request, rustix::fs::AtFlags::empty()),
            opcode::RMDIR => self.unlink(request, rustix::fs::AtFlags::REMOVEDIR),
            opcode::RENAME => self.rename(request, false),
            opcode::RENAME2 => self.rename(request, true),
            opcode::LINK => self.link(request, reply),
            opcode::OPEN => self.open(request, reply),
            opcode::CREATE => self.create(request, reply),
            opcode::TMPFILE => self.tmpfile(request, reply),
            opcode::READ => self.read(request, reply),
            opcode::WRITE => self.write(request, reply),
            opcode::STATFS => self.statfs(request, reply),
            opcode::RELEASE | opcode::RELEASEDIR => self.release(request),
            opcode::FSYNC | opcode::FSYNCDIR => self.fsync(request),
            opcode::SETXATTR => self.setxattr(request),
            opcode::GETXATTR => self.getxattr(request, reply),
            opcode::LISTXATTR => self.listxattr(request, reply),
            opcode::REMOVEXATTR => self.removexattr(request),
            opcode::FLUSH => self.flush(request),
            opcode::OPENDIR => self.opendir(request, reply),
            opcode::READDIR => self.readdir(request, reply, false),
            opcode::READDIRPLUS => self.readdir(request, reply, true),
            opcode::FALLOCATE => self.fallocate(request),
            opcode::LSEEK => self.lseek(request, reply),
            opcode::COPY_FILE_RANGE => self.copy_file_range(request, reply),
            opcode::IOCTL => Err(Errno::NOTTY),
            opcode::DESTROY => Ok(()),
            // FUSE_INIT is the first message or none at all.
            opcode::INIT => Err(Errno::INVAL),
            // The guest's kernel does without, and does not ask again.
            _ => Err(Errno::NOSYS),
        }
    }

    fn forget<'r>(&self, request: &Request<'_>) -> Option<&'r [u8]> {
        let lookups = request.arguments().u64().ok()?;
        self.files.nodes.forget(request.node, lookups);
        None
    }

    fn batch_forget<'r>(&self, request: &Request<'_>) -> Option<&'r [u8]> {
        let mut arguments = request.arguments();
        let count = arguments.u64().ok()? as u32; // the other half is padding
        for _ in 0..count {
            let (node, lookups) = (arguments.u64().ok()?, arguments.u64().ok()?);
            self.files.nodes.forget(node, lookups);
        }
        None
    }

    /// Files are made as the guest's process, and a network file system sees it asking. The
    /// capabilities stay: the guest's kernel has checked permissions, with groups that are not
    /// known here.
    fn act_as(&mut self, uid: u32, gid: u32) -> Answer {
        // The guest's kernel has no id for what it does by itself.
        let own = |id| if id == u32::MAX { 0 } else { id };
        let caller = (own(uid), own(gid));
        if self.caller != caller {
            a3s_box_sys::fsid::set(caller.0, caller.1).map_err(|_| Errno::PERM)?;
            self.caller = caller;
        }
        Ok(())
    }

    /// Runs `act` so that a write or truncation takes away set-user-id and set-group-id bits, as
    /// the guest's kernel asks when the caller there may not keep them.
    pub fn without_fsetid<T>(&self, wanted: bool, act: impl FnOnce() -> Answer<T>) -> Answer<T> {
        if !wanted {
            return act();
        }
        let sets = |effective| CapabilitySets {
            effective,
            permitted: CAPABILITIES,
            inheritable: CapabilitySet::empty(),
        };
        set_capabilities(None, sets(CAPABILITIES.difference(CapabilitySet::FSETID)))?;
        let result = act();
        set_capabilities(None, sets(CAPABILITIES))?;
        result
    }

    pub fn node(&self, request: &Request<'_>) -> Answer<Arc<Node>> {
        self.files.nodes.get(request.node)
    }

    /// The node, for an operation that changes it.
    pub fn writable(&self, number: u64) -> Answer<Arc<Node>> {
        let node = self.files.nodes.get(number)?;
        node.check_writable()?;
        Ok(node)
    }

    /// Opens what `fd` (O_PATH) is. The caller has made sure that it is a file or a folder: opening
    /// a device or a FIFO of the host would have effects there.
    pub fn reopen(&self, fd: &OwnedFd, flags: OFlags) -> Answer<OwnedFd> {
        let path = DecInt::new(fd.as_raw_fd());
        rustix::fs::openat(
            &self.files.descriptors,
            path,
            flags | OFlags::CLOEXEC | OFlags::NOCTTY,
            Mode::empty(),
        )
        .map_err(super::nodes::no_room)
    }

    /// Opens a regular file.
    pub fn reopen_file(&self, node: &Node, flags: OFlags) -> Answer<OwnedFd> {
        match node.kind {
            FileType::RegularFile => self.reopen(&node.fd, flags),
            FileType::Directory => Err(Errno::ISDIR),
            FileType::Symlink => Err(Errno::LOOP),
            _ => Err(Errno::NXIO),
        }
    }
}
