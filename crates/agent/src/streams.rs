//! A process's standard streams, between its pipes or terminal and a call's messages.
//!
//! Nothing is stored here but one message on its way: while nobody takes it, the pipe is not read,
//! and its writer waits.

use crate::error::{Error, Step};
use bytes::Bytes;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fd::OwnedFd,
    fs::OFlags,
    io::Errno,
    pipe::{PipeFlags, pipe_with},
    pty::OpenptFlags,
    termios::Winsize,
};
use std::sync::Arc;
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{mpsc, watch},
};

/// The largest message: with what is around it, it fills one frame of HTTP/2.
const CHUNK: usize = (16 << 10) - 64;

/// Which output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// Also a terminal's.
    Stdout,
    /// Standard error.
    Stderr,
}

/// The agent's ends.
#[derive(Debug)]
pub struct Streams {
    /// Where stdin goes.
    pub input: Input,
    /// What comes out.
    pub outputs: Vec<(Output, OutputEnd)>,
}

/// Where stdin goes.
#[derive(Debug, Default)]
pub struct Input {
    fd: Option<OwnedFd>,
    terminal: bool,
    /// Somebody else writes to it.
    sizes_only: bool,
}

/// One output's end.
#[derive(Debug)]
pub struct OutputEnd(Arc<AsyncFd<OwnedFd>>);

/// The child's ends of three new pipes, and the agent's. Without `stdin` the child reads nothing.
pub fn pipes(stdin: Stdin) -> Result<([Option<OwnedFd>; 3], Streams), Error> {
    let pipe = || pipe_with(PipeFlags::CLOEXEC).step("pipe");
    let (child_in, input) = match stdin {
        Stdin::Open => {
            let (read, write) = pipe()?;
            (read, Some(unblocked(write)?))
        }
        Stdin::Empty => (std::fs::File::open("/dev/null").step("/dev/null")?.into(), None),
    };
    let (out, child_out) = pipe()?;
    let (err, child_err) = pipe()?;
    let outputs =
        vec![(Output::Stdout, OutputEnd::new(out)?), (Output::Stderr, OutputEnd::new(err)?)];
    let streams =
        Streams { input: Input { fd: input, terminal: false, sizes_only: false }, outputs };
    Ok(([Some(child_in), Some(child_out), Some(child_err)], streams))
}

/// Whether anybody will write to stdin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stdin {
    /// A pipe.
    Open,
    /// /dev/null.
    Empty,
}

/// The streams of a terminal.
pub fn terminal(master: OwnedFd) -> Result<Streams, Error> {
    let fd = master.try_clone().step("standard streams")?;
    let input = Input { fd: Some(fd), terminal: true, sizes_only: false };
    Ok(Streams { input, outputs: vec![(Output::Stdout, OutputEnd::new(master)?)] })
}

/// Returns when the kernel is done with what was typed on a terminal; for a pipe, at once. A key that sends a
/// signal may have ended its process before it is shown: who reads only what is there would miss it.
pub fn settle(output: &OwnedFd) {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    if let Ok(peer) = rustix::pty::ioctl_tiocgptpeer(output, flags) {
        // A look at that end waits for the kernel's worker (n_tty_poll, tty_buffer_flush_work).
        poll(&mut [PollFd::new(&peer, PollFlags::IN)], Some(&Timespec::default())).ok();
    }
}

/// Writes everything to what blocks, whatever interrupts it.
///
/// # Errors
/// The write's, or `INTR` once `given_up`.
pub fn write_all(fd: &OwnedFd, mut bytes: &[u8], given_up: impl Fn() -> bool) -> Result<(), Errno> {
    while !bytes.is_empty() {
        if given_up() {
            return Err(Errno::INTR);
        }
        match rustix::io::write(fd, bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn block(fd: &OwnedFd) -> Result<(), Error> {
    rustix::fs::fcntl_setfl(fd, OFlags::empty()).step("standard streams")
}

fn unblocked(fd: OwnedFd) -> Result<OwnedFd, Error> {
    rustix::fs::fcntl_setfl(&fd, OFlags::NONBLOCK).step("standard streams")?;
    Ok(fd)
}

impl Input {
    /// Writes everything, waiting for the process to read. Nobody reading is not an error: the
    /// process need not take its input.
    pub async fn write(&mut self, mut bytes: &[u8]) {
        let Some(fd) = self.fd.as_ref().filter(|_| !self.sizes_only) else { return };
        while !bytes.is_empty() {
            match rustix::io::write(fd, bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let Ok(room) = a3s_box_sys::watch::room(fd) else { return self.fd = None };
                    if room.writable().await.is_err() {
                        return self.fd = None;
                    }
                }
                Err(_) => return self.close(),
            }
        }
    }

    /// The process reads the end of its input. A terminal stays: it has no end but a hang-up.
    pub fn close(&mut self) {
        if !self.terminal {
            self.fd = None;
        }
    }

    /// A handle that changes a terminal's size and writes nothing; of a pipe it does nothing at all.
    pub fn sizer(&self) -> Result<Self, Error> {
        let fd = self.fd.as_ref().filter(|_| self.terminal).map(OwnedFd::try_clone);
        let fd = fd.transpose().step("standard streams")?;
        Ok(Self { fd, terminal: self.terminal, sizes_only: true })
    }

    /// Whether it is a terminal's.
    pub fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// For a thread that may wait for room.
    pub fn blocking(self) -> Result<BlockingInput, Error> {
        if let Some(fd) = &self.fd {
            block(fd)?;
        }
        Ok(BlockingInput(self))
    }

    /// The terminal's new size; nothing for a pipe.
    pub fn resize(&self, width: u32, height: u32) {
        let size = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
        let size =
            Winsize { ws_row: size(height), ws_col: size(width), ws_xpixel: 0, ws_ypixel: 0 };
        if let (true, Some(fd)) = (self.terminal, &self.fd) {
            // It fails only when the terminal is gone, and then nobody looks at it.
            rustix::termios::tcsetwinsize(fd, size).ok();
        }
    }
}

/// Where stdin goes, for a thread.
#[derive(Debug, Default)]
pub struct BlockingInput(Input);

impl BlockingInput {
    /// Writes everything, as [`Input::write`] does; what is left is dropped when the thread is interrupted and
    /// `given_up` says so.
    pub fn write(&mut self, bytes: &[u8], given_up: impl Fn() -> bool) {
        let Some(fd) = &self.0.fd else { return };
        match write_all(fd, bytes, given_up) {
            Ok(()) | Err(Errno::INTR) => {}
            Err(_) => self.close(),
        }
    }

    /// As [`Input::close`].
    pub fn close(&mut self) {
        self.0.close();
    }
}

impl OutputEnd {
    /// Takes the reading end.
    pub fn new(fd: OwnedFd) -> Result<Self, Error> {
        let watched = a3s_box_sys::watch::watch(unblocked(fd)?, Interest::READABLE);
        watched.map(|fd| Self(Arc::new(fd))).step("standard streams")
    }

    /// Passes output on until its end, or, once `ended` is true, until nothing is left of what the
    /// process wrote. When nobody takes messages any more, output is read and thrown away, so that
    /// the process is not stopped by it.
    pub async fn pump<T>(
        self,
        messages: mpsc::Sender<T>,
        wrap: impl Fn(Bytes) -> T,
        mut ended: watch::Receiver<bool>,
    ) {
        let mut buffer = Vec::with_capacity(CHUNK);
        // What there was has been read, and more of it is an event.
        let mut empty = true;
        let mut settled = false;
        loop {
            if empty && !*ended.borrow() {
                tokio::select! {
                    ready = self.0.readable() => match ready {
                        Ok(mut ready) => ready.clear_ready(),
                        Err(_) => return,
                    },
                    // An error: the sender is gone, and so is the process.
                    changed = ended.changed() => if changed.is_err() { return },
                }
            }
            let permit = messages.reserve().await.ok();
            buffer.clear();
            match rustix::io::read(self.0.get_ref(), rustix::buffer::spare_capacity(&mut buffer)) {
                Ok(0) => return,
                Ok(count) => {
                    empty = count < CHUNK;
                    if let Some(permit) = permit {
                        permit.send(wrap(Bytes::copy_from_slice(&buffer)));
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if !*ended.borrow() => empty = true,
                // That is all, unless the last key's echo is still to come. A terminal whose last user is gone
                // says EIO.
                Err(Errno::AGAIN | Errno::IO) if !settled => {
                    settled = true;
                    empty = false;
                    settle(self.0.get_ref());
                }
                Err(_) => return,
            }
        }
    }

    /// For a thread that may wait for output. There must be no [`Self::rest`] of it.
    pub fn blocking(self) -> Result<OwnedFd, Error> {
        let fd = Arc::into_inner(self.0).map(AsyncFd::into_inner);
        let fd = fd.ok_or_else(|| Error::NotNow("an output has two readers".to_owned()))?;
        block(&fd)?;
        Ok(fd)
    }

    /// A second handle, to keep reading for those who still write after the process's own end.
    pub fn rest(&self) -> Self {
        Self(Arc::clone(&self.0))
    }

    /// Reads to the end and throws it away.
    pub async fn discard(self) {
        let mut buffer = [0; 4096];
        loop {
            match rustix::io::read(self.0.get_ref(), &mut buffer) {
                Ok(1..) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => match self.0.readable().await {
                    Ok(mut ready) => ready.clear_ready(),
                    Err(_) => return,
                },
                Ok(0) | Err(_) => return,
            }
        }
    }
}
