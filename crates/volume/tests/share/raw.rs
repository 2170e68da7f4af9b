//! A guest without a kernel: sends whatever bytes it likes.

use crate::fixture::{Process, process};
use a3s_box_volume::{Access, Propagation, Share};
use anyhow::{Context, Result, ensure};
use rustix::mount::UnmountFlags;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Stdio;

pub mod op {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const READLINK: u32 = 5;
    pub const MKNOD: u32 = 8;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const CREATE: u32 = 35;
    pub const BATCH_FORGET: u32 = 42;
}

pub const ROOT: u64 = 1;

/// A server and the stream to it.
pub struct Raw {
    pub stream: UnixStream,
    pub server: Process,
    pub host: PathBuf,
    unique: u64,
    dir: tempfile::TempDir,
}

/// An answer's error (0: none) and body.
pub type Answer = (i32, Vec<u8>);

impl Raw {
    /// With volume `volumes/c/0`, and FUSE_INIT not sent yet.
    pub fn start() -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("a3s-box-volume-").tempdir_in("/var/tmp")?;
        let [root, host] = ["share", "host"].map(|name| dir.path().join(name));
        fs::create_dir(&host)?;
        let share = Share::create(&root)?;
        share.add("volumes/c/0", &host, Access::ReadWrite, Propagation::HostToContainer)?;
        let (ours, theirs) = UnixStream::pair()?;
        let root = root.to_str().context("path")?;
        // What it says about a guest that breaks the protocol is not the test's output.
        let server = process(&["server", root], ours.into(), Stdio::inherit())?;
        Ok(Self { stream: theirs, server, host, unique: 0, dir })
    }

    pub fn connected() -> Result<Self> {
        let mut raw = Self::start()?;
        let (error, body) = raw.ask(op::INIT, 0, &init())?;
        ensure!(error == 0 && body.len() == 64);
        Ok(raw)
    }

    pub fn send(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<u64> {
        self.unique += 1;
        let mut message = Vec::new();
        message.extend_from_slice(&(40 + body.len() as u32).to_ne_bytes());
        message.extend_from_slice(&opcode.to_ne_bytes());
        message.extend_from_slice(&self.unique.to_ne_bytes());
        message.extend_from_slice(&node.to_ne_bytes());
        message.extend_from_slice(&[0; 16]); // root, no process
        message.extend_from_slice(body);
        self.stream.write_all(&message)?;
        Ok(self.unique)
    }

    pub fn receive(&mut self) -> Result<(u64, Answer)> {
        let mut header = [0; 16];
        self.stream.read_exact(&mut header)?;
        let number =
            |at: usize| -> Result<u32> { Ok(u32::from_ne_bytes(header[at..at + 4].try_into()?)) };
        let mut body = vec![0; (number(0)? as usize).checked_sub(16).context("length")?];
        self.stream.read_exact(&mut body)?;
        let unique = u64::from_ne_bytes(header[8..16].try_into()?);
        Ok((unique, (-(number(4)? as i32), body)))
    }

    pub fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Answer> {
        let unique = self.send(opcode, node, body)?;
        let (answered, answer) = self.receive()?;
        ensure!(answered == unique);
        Ok(answer)
    }

    /// The number of `name` in `parent`.
    pub fn lookup(&mut self, parent: u64, name: &str) -> Result<u64> {
        let (error, body) = self.ask(op::LOOKUP, parent, &string(name))?;
        ensure!(error == 0, "look up {name}: {error}");
        first(&body)
    }

    /// The volume's number.
    pub fn volume(&mut self) -> Result<u64> {
        let volumes = self.lookup(ROOT, "volumes")?;
        let container = self.lookup(volumes, "c")?;
        self.lookup(container, "0")
    }

    pub fn is_alive(&mut self) -> Result<bool> {
        Ok(self.ask(op::GETATTR, ROOT, &[0; 16])?.0 == 0)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        rustix::mount::unmount(self.dir.path().join("share"), UnmountFlags::DETACH).ok();
    }
}

pub fn init() -> Vec<u8> {
    numbers(&[7, 41, 128 << 10, u32::MAX, u32::MAX, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
}

pub fn numbers(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|n| n.to_ne_bytes()).collect()
}

pub fn longs(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|n| n.to_ne_bytes()).collect()
}

pub fn string(text: &str) -> Vec<u8> {
    [text.as_bytes(), b"\0"].concat()
}

/// A body's first number.
pub fn first(body: &[u8]) -> Result<u64> {
    Ok(u64::from_ne_bytes(body.get(..8).context("short")?.try_into()?))
}
