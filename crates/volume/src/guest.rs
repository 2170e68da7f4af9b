//! The guest's half: mounts the share and carries FUSE's messages between `/dev/fuse` and the
//! port.
//!
//! The host's end of the port comes and goes: a template is saved between the answer to FUSE_INIT
//! and the first real request, and each of its clones is connected anew. While nobody is there,
//! requests wait. A request that was under way when the host hung up is answered with EIO, because
//! its answer will never come.
//!
//! **Who looks at the port.** Linux' virtio_console takes the next message of the host out of the queue in
//! any poll(2) of the port, and with that may spare the host the interrupt that would have woken whoever
//! waits for that message: it would sleep until there is another one. So only the thread that reads may
//! look; where the other one must, it tells the reader afterwards.
//!
//! One thread per direction. Notifications of the host (messages whose `unique` is 0) get a third,
//! made when the first one comes: the kernel may have to wait for a request's answer before it can
//! take one, and that answer would be next in line. One notification is not the kernel's but this
//! module's own, to make inotify speak; `host/updates.rs` says why.

use crate::wire::{self, IN_HEADER, MAX_MESSAGE, OUT_HEADER};
use rustix::event::{EventfdFlags, PollFd, PollFlags, epoll, eventfd, poll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::mount::MountFlags;
use std::collections::HashSet;
use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, mpsc};

/// The pump's threads call nothing deep.
const STACK: usize = 64 << 10;
/// What the kernel reads ahead; its default is 128 KiB.
const READ_AHEAD_KIB: usize = wire::MAX_WRITE >> 10;

/// Mounts the share at `target` and returns the descriptor to give to [`pump`]. Nothing can be
/// read from it until the pump runs; the kernel's FUSE_INIT is already queued.
pub fn mount(target: &Path) -> io::Result<OwnedFd> {
    let fuse: OwnedFd = File::options().read(true).write(true).open("/dev/fuse")?.into();
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions,max_read={}",
        fuse.as_raw_fd(),
        wire::MAX_WRITE
    );
    let options = CString::new(options)?;
    rustix::mount::mount("a3s-box", target, "fuse", MountFlags::empty(), options.as_c_str())?;
    match read_ahead(target) {
        // Slower, not wrong: /proc or /sys is not mounted here.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        other => other?,
    }
    Ok(fuse)
}

/// Sets the mount's read-ahead. The device number comes from mountinfo: stat would ask the host.
fn read_ahead(target: &Path) -> io::Result<()> {
    let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo")?;
    let device = mounts
        .lines()
        .rev()
        .find_map(|line| {
            let mut fields = line.split(' ').skip(2);
            let device = fields.next()?;
            (Path::new(fields.nth(1)?) == target).then_some(device)
        })
        .ok_or(io::ErrorKind::NotFound)?;
    std::fs::write(format!("/sys/class/bdi/{device}/read_ahead_kb"), READ_AHEAD_KIB.to_string())
}

/// Carries messages of the share at `target` until it is unmounted. `port`, which does not block from now
/// on, may hang up and be connected again at any time; it stays open after the return.
pub fn pump(fuse: OwnedFd, port: File, target: &Path) -> io::Result<()> {
    rustix::fs::fcntl_setfl(&port, rustix::fs::OFlags::NONBLOCK)?;
    let link = Arc::new(Link {
        fuse: File::from(fuse),
        port,
        look: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?.into(),
        target: target.to_owned(),
        unanswered: Mutex::new(HashSet::new()),
    });
    let replies = Arc::clone(&link);
    std::thread::Builder::new().name("share-replies".to_owned()).stack_size(STACK).spawn(
        move || {
            // An error here is the port's end (hot-unplug) or a host that breaks the protocol:
            // nothing can be answered any more, so let waiting requests know.
            if carry_replies(&replies).is_err() {
                replies.fail_all();
            }
        },
    )?;
    carry_requests(&link)
}

struct Link {
    fuse: File,
    port: File,
    /// Tells the reader to look at the port again.
    look: File,
    /// Where the share is mounted.
    target: PathBuf,
    /// Requests the port has taken bytes of and that have no answer yet.
    unanswered: Mutex<HashSet<u64>>,
}

impl Link {
    fn unanswered(&self) -> std::sync::MutexGuard<'_, HashSet<u64>> {
        self.unanswered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers `unique` with EIO unless somebody else has answered it.
    fn fail(&self, unique: u64) {
        if self.unanswered().remove(&unique) {
            self.answer(&wire::out_header(OUT_HEADER, -Errno::IO.raw_os_error(), unique));
        }
    }

    /// Passes a message on that answers nothing.
    fn take_note(&self, message: &[u8]) {
        if wire::u32_at(message, 4) == wire::REPLAY as u32 {
            self.replay(&message[OUT_HEADER..]);
        } else {
            self.answer(message);
        }
    }

    /// Does again what the host has done, for those who wait for it here.
    fn replay(&self, folder: &[u8]) {
        let Ok(folder) = CStr::from_bytes_with_nul(folder) else { return };
        let folder = self.target.join(OsStr::from_bytes(folder.to_bytes()));
        let name = |name: &CStr| folder.join(OsStr::from_bytes(name.to_bytes()));
        // A volume that has gone has no one waiting.
        std::fs::rename(name(wire::REPLAYED), name(wire::UPDATED)).ok();
    }

    /// Writes what it can of a request. From its first byte on it waits for an answer.
    fn put(&self, request: &[u8], sent: usize) -> io::Result<usize> {
        // Held, so that no answer and no hang-up comes between.
        let mut unanswered = self.unanswered();
        let written = (&self.port).write(&request[sent..]);
        let waits = matches!(&written, Err(error) if matches!(
            Errno::from_io_error(error), Some(Errno::AGAIN | Errno::INTR)));
        if sent == 0 && !waits && wire::is_answered(wire::u32_at(request, 4)) {
            unanswered.insert(wire::u64_at(request, 8));
        }
        written
    }

    /// Waits for something to read. The reader's.
    fn wait_readable(&self) -> io::Result<()> {
        let mut set =
            [PollFd::new(&self.port, PollFlags::IN), PollFd::new(&self.look, PollFlags::IN)];
        match poll(&mut set, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if !set[1].revents().is_empty() {
            (&self.look).read_exact(&mut [0; 8])?;
        }
        Ok(())
    }

    /// The port's state once it takes more, or has been hung up. The writer's.
    fn wait_writable(&self) -> io::Result<PollFlags> {
        let state = state(&self.port, PollFlags::OUT, None);
        self.tell_reader()?;
        state
    }

    /// Waits until somebody is at the other end. The writer's.
    fn wait_connected(&self) -> io::Result<()> {
        let connected = Edges::new(&self.port).and_then(|edges| edges.wait_connected(&self.port));
        self.tell_reader()?;
        connected
    }

    /// The writer has looked at the port: what there is to read may be known to nobody else.
    fn tell_reader(&self) -> io::Result<()> {
        (&self.look).write_all(&1_u64.to_ne_bytes())
    }

    fn fail_all(&self) {
        let all: Vec<u64> = self.unanswered().iter().copied().collect();
        for unique in all {
            self.fail(unique);
        }
    }

    /// Hands one message to the kernel. It refuses an answer whose request was interrupted or
    /// killed, and a notification about something it does not know: neither is an error here.
    fn answer(&self, message: &[u8]) {
        while matches!((&self.fuse).write(message), Err(e) if e.kind() == io::ErrorKind::Interrupted)
        {
        }
    }
}

/// Waits for edges of the port's state. A level-triggered poll would spin: the port reports a
/// hang-up for as long as nobody is connected.
struct Edges(OwnedFd);

impl Edges {
    fn new(port: &File) -> io::Result<Self> {
        let edges = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&edges, port, epoll::EventData::new_u64(0), flags)?;
        Ok(Self(edges))
    }

    fn wait_connected(&self, port: &File) -> io::Result<()> {
        while state(port, PollFlags::OUT, Some(0))?.contains(PollFlags::HUP) {
            let mut event = [std::mem::MaybeUninit::uninit()];
            match epoll::wait(&self.0, &mut event[..], None) {
                Err(Errno::INTR) | Ok(_) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// The port's state; without a `timeout` it waits for one of `wanted` or a hang-up.
fn state(port: &File, wanted: PollFlags, timeout: Option<i64>) -> io::Result<PollFlags> {
    let timeout = timeout.map(|seconds| rustix::event::Timespec { tv_sec: seconds, tv_nsec: 0 });
    loop {
        let mut set = [PollFd::new(port, wanted)];
        match poll(&mut set, timeout.as_ref()) {
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => return Ok(set[0].revents()),
        }
    }
}

/// `/dev/fuse` to the port.
fn carry_requests(link: &Link) -> io::Result<()> {
    let mut buffer = vec![0; MAX_MESSAGE];
    loop {
        let length = match (&link.fuse).read(&mut buffer) {
            Ok(length) if length >= IN_HEADER => length,
            Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) => match Errno::from_io_error(&error) {
                Some(Errno::NODEV) => return Ok(()), // unmounted
                // The request was taken back before it was read.
                Some(Errno::NOENT | Errno::INTR | Errno::AGAIN) => continue,
                _ => return Err(error),
            },
        };
        send(link, &buffer[..length])?;
    }
}

/// Sends one request as a whole, or fails it when the host hangs up in its middle.
fn send(link: &Link, request: &[u8]) -> io::Result<()> {
    let unique = wire::u64_at(request, 8);
    let mut sent = 0;
    while sent < request.len() {
        match link.put(request, sent) {
            Ok(count) => sent += count,
            Err(error) => match Errno::from_io_error(&error) {
                Some(Errno::INTR) => {}
                // Full, or nobody is there.
                Some(Errno::AGAIN) => {
                    if !link.wait_writable()?.contains(PollFlags::HUP) {
                        continue;
                    }
                    if sent > 0 {
                        link.fail(unique);
                        return Ok(());
                    }
                    link.wait_connected()?;
                }
                Some(Errno::PIPE | Errno::IO) => {
                    link.fail(unique);
                    return Ok(());
                }
                _ => return Err(error),
            },
        }
    }
    Ok(())
}

/// The port to `/dev/fuse`.
fn carry_replies(link: &Arc<Link>) -> io::Result<()> {
    let edges = Edges::new(&link.port)?;
    let mut notifications: Option<mpsc::Sender<Vec<u8>>> = None;
    let mut buffer = vec![0; MAX_MESSAGE];
    let mut filled = 0;
    loop {
        let count = match (&link.port).read(&mut buffer[filled..]) {
            Ok(count) => count,
            Err(error) => match Errno::from_io_error(&error) {
                Some(Errno::INTR) => continue,
                Some(Errno::AGAIN) => {
                    link.wait_readable()?;
                    continue;
                }
                // What a port that is not a virtio one says for a hang-up.
                Some(Errno::CONNRESET | Errno::IO) => 0,
                _ => return Err(error),
            },
        };
        if count == 0 {
            filled = 0;
            link.fail_all();
            edges.wait_connected(&link.port)?;
            continue;
        }
        filled += count;
        let mut start = 0;
        while filled - start >= OUT_HEADER {
            let length = wire::u32_at(&buffer, start) as usize;
            if !(OUT_HEADER..=MAX_MESSAGE).contains(&length) {
                return Err(io::ErrorKind::InvalidData.into());
            }
            if filled - start < length {
                break;
            }
            let message = &buffer[start..start + length];
            match wire::u64_at(message, 8) {
                0 => notify(link, &mut notifications, message)?,
                unique => {
                    link.unanswered().remove(&unique);
                    link.answer(message);
                }
            }
            start += length;
        }
        buffer.copy_within(start..filled, 0);
        filled -= start;
    }
}

/// Leaves a notification to the thread for them.
fn notify(
    link: &Arc<Link>,
    queue: &mut Option<mpsc::Sender<Vec<u8>>>,
    message: &[u8],
) -> io::Result<()> {
    let sender = match queue {
        Some(sender) => sender,
        None => {
            let (sender, receiver) = mpsc::channel::<Vec<u8>>();
            let link = Arc::clone(link);
            std::thread::Builder::new()
                .name("share-notify".to_owned())
                .stack_size(STACK)
                .spawn(move || receiver.iter().for_each(|message| link.take_note(&message)))?;
            queue.insert(sender)
        }
    };
    sender.send(message.to_vec()).map_err(|_| io::ErrorKind::BrokenPipe.into())
}
