//! What the share's owner tells the volume server, which sees mounts come and go but not why.
//!
//! One order is a letter, a path in the share and a zero byte; its answer is an error number, or 0.
//! Both ends are ours.

use super::message::Answer;
use super::worker::Files;
use super::{Error, Result, init};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use std::ffi::CString;
use std::io::{self, BufRead, BufReader};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

const HOLD: u8 = b'h';
const RELEASE: u8 = b'r';
const WATCH: u8 = b'w';
const UNWATCH: u8 = b'u';

/// Who gives orders to a volume server.
#[derive(Debug)]
pub struct Owner {
    /// The server's end of the pair that [`Orders`] has the other end of.
    pub orders: UnixStream,
    /// User who is charged for watching volumes.
    pub charged: u32,
}

/// The owner's end.
#[derive(Debug)]
pub struct Orders(Mutex<UnixStream>);

impl Orders {
    /// On one end of a pair whose other end is the server's.
    pub fn new(stream: UnixStream) -> Self {
        Self(Mutex::new(stream))
    }

    /// From now on `name` stands for what is there at this moment, whatever the host mounts on it.
    pub fn hold(&self, name: &Path) -> Result<()> {
        self.give(HOLD, name).map_err(failed("hold", name))
    }

    /// The end of that.
    pub fn release(&self, name: &Path) -> Result<()> {
        self.give_if_there(RELEASE, name).map_err(failed("release", name))
    }

    /// From now on the guest is told when kubelet updates the volume `name`.
    pub fn watch(&self, name: &Path) -> Result<()> {
        self.give(WATCH, name).map_err(failed("watch", name))
    }

    /// The end of that for the volume at `prefix` and all below it.
    pub fn unwatch(&self, prefix: &Path) -> Result<()> {
        self.give_if_there(UNWATCH, prefix).map_err(failed("unwatch", prefix))
    }

    /// Fine when the server has ended: then it holds and watches nothing.
    fn give_if_there(&self, order: u8, name: &Path) -> io::Result<()> {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
        match self.give(order, name) {
            Err(error) if matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof) => {
                Ok(())
            }
            given => given,
        }
    }

    fn give(&self, order: u8, name: &Path) -> io::Result<()> {
        let name = CString::new(name.as_os_str().as_bytes())?;
        let stream = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let message = [&[order], name.as_bytes_with_nul()].concat();
        init::write_all(&stream, &message)?;
        let mut answer = [0; 4];
        init::read_exact(&stream, &mut answer)?;
        match i32::from_ne_bytes(answer) {
            0 => Ok(()),
            number => Err(io::Error::from_raw_os_error(number)),
        }
    }
}

fn failed(step: &'static str, name: &Path) -> impl FnOnce(io::Error) -> Error {
    let name = name.display().to_string();
    move |source| Error::Order { step, name, source }
}

/// The server's end: does them in turn, until nobody gives any more, and tells the guest in between
/// what has happened to the volumes.
pub fn obey(stream: &UnixStream, files: &Files, tell: impl Fn(&[u8]) -> Result<()>) -> Result<()> {
    let mut reader = BufReader::new(stream);
    loop {
        // An order is read to its end and answered before there is another.
        let mut waiting = vec![PollFd::new(stream, PollFlags::IN)];
        let updates = files.updates.as_ref();
        waiting.extend(updates.map(|updates| PollFd::new(&updates.inotify, PollFlags::IN)));
        match poll(&mut waiting, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(Error::Stream(error.into())),
        }
        let [ordered, happened] =
            [0, 1].map(|at| waiting.get(at).is_some_and(|one| !one.revents().is_empty()));
        if let Some(updates) = updates.filter(|_| happened) {
            let messages = updates.messages(&files.nodes);
            for message in messages.map_err(|error| Error::Stream(error.into()))? {
                tell(&message)?;
            }
        }
        if ordered {
            let mut order = Vec::new();
            let length = reader.read_until(0, &mut order).map_err(Error::Stream)?;
            if length == 0 {
                return Ok(());
            }
            let number = obey_one(&order, files).map_or_else(Errno::raw_os_error, |()| 0);
            // Whoever has gone is found at the next read.
            init::write_all(stream, &number.to_ne_bytes()).ok();
        }
    }
}

fn obey_one(order: &[u8], files: &Files) -> Answer {
    let (order, path) = order.split_first().ok_or(Errno::INVAL)?;
    let path = CString::from_vec_with_nul(path.to_vec()).map_err(|_| Errno::INVAL)?;
    let root = files.nodes.get(super::nodes::ROOT)?;
    match *order {
        HOLD => files.nodes.held().hold(&root.fd, &path),
        RELEASE => files.nodes.held().release(&root.fd, &path),
        WATCH => files.updates.as_ref().ok_or(Errno::NOSYS)?.watch(&root.fd, &path),
        UNWATCH => {
            files.updates.as_ref().ok_or(Errno::NOSYS)?.unwatch(&path);
            Ok(())
        }
        _ => Err(Errno::INVAL),
    }
}
