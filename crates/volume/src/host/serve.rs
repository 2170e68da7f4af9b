//! The volume server's process: confined first, then a loop over messages.
//!
//! The main thread makes the others and waits for them: it keeps its credentials, because the
//! kernel forgets a thread's parent-death signal when they change. Each of the others reads a
//! whole message, lets the next one read, does what it says and writes the whole answer. More than
//! one, so that a slow disk or a dead file server behind one volume does not stop the rest.

use super::attributes::Numbers;
use super::handles::Handles;
use super::message::{Reply, Request};
use super::nodes::{Nodes, Zone};
use super::orders::{self, Owner};
use super::updates::Updates;
use super::worker::{Files, Worker};
use super::{Error, Result, confine, init};
use crate::wire::{self, IN_HEADER, MAX_MESSAGE, opcode};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};

/// Requests that are worked on at the same time.
const WORKERS: usize = 2;
const STACK: usize = 128 << 10;
/// Descriptors that are neither nodes nor handles.
const OWN_DESCRIPTORS: usize = 64;

/// The whole life of the volume server: shuts the process into the share at `root`, then serves it
/// on `stream` until the guest hangs up. `init` is the FUSE_INIT of a guest that was answered
/// already; without it, the guest begins with one. `owner` is who gives [`Orders`](super::Orders).
///
/// The process should hold nothing but the streams and its standard descriptors, and have one thread.
pub fn serve(
    root: &Path,
    stream: UnixStream,
    init: Option<Vec<u8>>,
    owner: Option<Owner>,
) -> Result<()> {
    serve_zone(root, Zone::Share, stream, init, owner)
}

/// As [`serve`], for one mount at `root` that is a volume by itself. The other side begins with a
/// FUSE_INIT.
pub fn serve_mount(root: &Path, stream: UnixStream) -> Result<()> {
    serve_zone(root, Zone::Volume, stream, None, None)
}

fn serve_zone(
    root: &Path,
    zone: Zone,
    stream: UnixStream,
    init: Option<Vec<u8>>,
    owner: Option<Owner>,
) -> Result<()> {
    let answered = match init {
        None => false,
        Some(init) if init::answer(&init).is_some() => true,
        Some(_) => {
            return Err(Error::Protocol("the message answered before is no FUSE_INIT"));
        }
    };
    stream.set_nonblocking(false).map_err(Error::Stream)?;
    let descriptors = confine::descriptors()?.saturating_sub(OWN_DESCRIPTORS);
    let inotify = owner.as_ref().map(|owner| confine::inotify(owner.charged)).transpose()?;
    let confine::Inside { root, descriptors: fds } = confine::enter(root, zone == Zone::Share)?;
    let handles = descriptors / 4;
    let files = Files {
        nodes: Nodes::new(root, zone, descriptors - handles)
            .map_err(|error| Error::Confine { step: "look at the share", source: error.into() })?,
        handles: Handles::new(handles),
        numbers: Numbers::new(),
        updates: inotify.map(Updates::new),
        descriptors: fds,
    };
    confine::drop_privileges()?;
    let (reading, writing) = (Mutex::new(()), Mutex::new(()));
    let orders = owner.map(|owner| owner.orders);
    let server = Server { files: &files, stream, orders, reading, writing };
    server.run(answered)
}

struct Server<'a> {
    files: &'a Files,
    stream: UnixStream,
    /// From the share's owner.
    orders: Option<UnixStream>,
    /// Held while a message is read.
    reading: Mutex<()>,
    /// Held while an answer is written.
    writing: Mutex<()>,
}

fn lock(mutex: &Mutex<()>) -> MutexGuard<'_, ()> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Server<'_> {
    fn run(&self, answered: bool) -> Result<()> {
        std::thread::scope(|scope| {
            // The threads come before the filter, which lets none be made or start.
            let closed = lock(&self.reading);
            let (started, starts) = mpsc::channel();
            let mut workers = Vec::new();
            let works = std::iter::repeat_n(Self::work as fn(&Self) -> Result<()>, WORKERS);
            for work in works.chain(self.orders.is_some().then_some(Self::obey as _)) {
                let worker = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, {
                    let started = started.clone();
                    move || {
                        // The other end waits for this.
                        started.send(()).ok();
                        work(self)
                    }
                });
                match worker {
                    Ok(worker) => {
                        // An error is a thread that is gone already, and is found below.
                        starts.recv().ok();
                        workers.push(worker);
                    }
                    Err(source) => {
                        self.hang_up();
                        let step = "make its threads";
                        return Err(Error::Confine { step, source });
                    }
                }
            }
            let mut result = confine::filter();
            if result.is_ok() && !answered {
                result = self.answer_init();
            }
            if result.is_err() {
                self.hang_up();
            }
            drop(closed);
            for worker in workers {
                let ended =
                    worker.join().unwrap_or(Err(Error::Protocol("an operation failed badly")));
                result = result.and(ended);
            }
            result
        })
    }

    /// Ends all threads: they find the streams at their ends.
    fn hang_up(&self) {
        for stream in std::iter::once(&self.stream).chain(&self.orders) {
            // It may have ended already.
            stream.shutdown(std::net::Shutdown::Both).ok();
        }
    }

    /// Does what the share's owner says, to its end.
    fn obey(&self) -> Result<()> {
        let tell = |message: &[u8]| {
            let _writing = lock(&self.writing);
            self.send(message)
        };
        self.orders.as_ref().map_or(Ok(()), |orders| orders::obey(orders, self.files, tell))
    }

    fn answer_init(&self) -> Result<()> {
        let mut message = vec![0; MAX_MESSAGE];
        let Some(length) = self.receive(&mut message)? else {
            return Ok(());
        };
        let reply = init::answer(&message[..length])
            .ok_or(Error::Protocol("no FUSE_INIT, or one of an old kernel"))?;
        self.send(&reply)
    }

    fn work(&self) -> Result<()> {
        let result = self.work_until_end();
        self.hang_up();
        result
    }

    fn work_until_end(&self) -> Result<()> {
        let mut worker = Worker::new(self.files);
        let mut message = vec![0; MAX_MESSAGE];
        let mut reply = Reply::new();
        loop {
            let reading = lock(&self.reading);
            let Some(length) = self.receive(&mut message)? else {
                return Ok(());
            };
            let request = Request::new(&message[..length]);
            // What does not wait for a disk is done before the next one may read: handing over
            // takes longer.
            let reading = is_quick(&request).then_some(reading);
            if let Some(answer) = worker.handle(&request, &mut reply) {
                let _writing = lock(&self.writing);
                self.send(answer)?;
            }
            drop(reading);
        }
    }

    /// Reads one message; `None` when the guest has hung up.
    fn receive(&self, message: &mut [u8]) -> Result<Option<usize>> {
        let (header, _) = message.split_at_mut(IN_HEADER);
        if !self.read(header)? {
            return Ok(None);
        }
        let length = wire::u32_at(header, 0) as usize;
        let Some(body) = message.get_mut(IN_HEADER..length) else {
            return Err(Error::Protocol("a message of impossible length"));
        };
        Ok(self.read(body)?.then_some(length))
    }

    fn read(&self, bytes: &mut [u8]) -> Result<bool> {
        match init::read_exact(&self.stream, bytes) {
            Ok(()) => Ok(true),
            Err(error) if is_end(&error) => Ok(false),
            Err(error) => Err(Error::Stream(error)),
        }
    }

    fn send(&self, message: &[u8]) -> Result<()> {
        match init::write_all(&self.stream, message) {
            // The next read says so, too.
            Err(error) if is_end(&error) => Ok(()),
            other => other.map_err(Error::Stream),
        }
    }
}

fn is_end(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

/// Whether the operation is one of memory alone.
fn is_quick(request: &Request<'_>) -> bool {
    use opcode::{BATCH_FORGET, FORGET, INTERRUPT};
    matches!(request.opcode, FORGET | BATCH_FORGET | INTERRUPT)
}
