//! A virtio-serial port: a byte stream to the host, whose other end comes and goes.
//!
//! When the host connects, the guest speaks first: [`HELLO`]. The host is silent until it has seen
//! that, and the guest says nothing more until the host speaks, so a template can be saved between
//! the two.

use a3s_box_sys::duplex::Duplex;
use rustix::{
    event::{PollFd, PollFlags, Timespec, epoll, poll},
    fd::OwnedFd,
    io::Errno,
};
use std::{
    fs::{self, File},
    io,
    mem::MaybeUninit,
    path::PathBuf,
};
use tokio::io::{Interest, unix::AsyncFd};

/// The first bytes of every connection.
pub const HELLO: &[u8; 8] = b"A3SBOX1\n";

const CLASS: &str = "/sys/class/virtio-ports";

/// Finds and opens the port of that name; none when the machine has no such port.
pub fn open(name: &str) -> io::Result<Option<File>> {
    let entries = match fs::read_dir(CLASS) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("name")).is_ok_and(|found| found.trim() == name) {
            let device = PathBuf::from("/dev").join(entry.file_name());
            return File::options().read(true).write(true).open(device).map(Some);
        }
    }
    Ok(None)
}

/// The agent's port.
#[derive(Debug)]
pub struct Port(File);

impl Port {
    /// Takes an open port.
    pub fn new(file: File) -> io::Result<Self> {
        rustix::fs::fcntl_setfl(&file, rustix::fs::OFlags::NONBLOCK)?;
        Ok(Self(file))
    }

    /// Waits for the host, says hello, and returns once the host has spoken. Needs a runtime.
    pub async fn connect(&self) -> io::Result<Duplex> {
        // It has ended before there is a connection: one looker at a time (see `a3s_box_volume::guest`).
        self.wait_for_host().await?;
        // The device would take slices one by one, each with an exit of the machine.
        Ok(Duplex::new(self.0.try_clone()?)?.gathering())
    }

    async fn wait_for_host(&self) -> io::Result<()> {
        let edges = Edges::new(&self.0)?;
        loop {
            edges.until(|state| !state.contains(PollFlags::HUP)).await?;
            if !edges.say_hello().await? {
                continue;
            }
            let state =
                edges.until(|state| state.intersects(PollFlags::IN | PollFlags::HUP)).await?;
            if !state.contains(PollFlags::HUP) {
                return Ok(());
            }
        }
    }
}

/// Reports a change of the port once: a port without a host is "readable" all the time.
struct Edges<'a> {
    file: &'a File,
    changes: AsyncFd<OwnedFd>,
}

impl<'a> Edges<'a> {
    fn new(file: &'a File) -> io::Result<Self> {
        let changes = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&changes, file, epoll::EventData::new_u64(0), flags)?;
        Ok(Self { file, changes: a3s_box_sys::watch::watch(changes, Interest::READABLE)? })
    }

    /// False when the host hung up.
    async fn say_hello(&self) -> io::Result<bool> {
        let mut rest = HELLO.as_slice();
        while !rest.is_empty() {
            match rustix::io::write(self.file, rest) {
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let state = self
                        .until(|state| state.intersects(PollFlags::OUT | PollFlags::HUP))
                        .await?;
                    if state.contains(PollFlags::HUP) {
                        return Ok(false);
                    }
                }
                Err(Errno::PIPE) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }

    async fn until(&self, wanted: impl Fn(PollFlags) -> bool) -> io::Result<PollFlags> {
        loop {
            let state = self.state()?;
            if wanted(state) {
                return Ok(state);
            }
            let mut ready = self.changes.readable().await?;
            ready.clear_ready();
            let mut events = [MaybeUninit::uninit(); 4];
            epoll::wait(self.changes.get_ref(), &mut events, Some(&Timespec::default()))?;
        }
    }

    fn state(&self) -> io::Result<PollFlags> {
        let mut set = [PollFd::new(self.file, PollFlags::IN | PollFlags::OUT)];
        rustix::io::retry_on_intr(|| poll(&mut set, Some(&Timespec::default())))?;
        Ok(set[0].revents())
    }
}
