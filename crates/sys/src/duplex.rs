//! A byte stream that wakes its task for what arrives, and for room only while there is none.
//!
//! Of a socket that is watched for both, the runtime hears whenever the other end has read something:
//! twice as many wake-ups as there are messages.

use crate::watch;
use rustix::{fs::FileType, io::Errno};
use std::{
    io::{self, IoSlice},
    os::fd::OwnedFd,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf, unix::AsyncFd};

/// Bytes of one read, and of one write that gathers slices.
const LARGEST: usize = 32 << 10;

/// A connected socket, or a virtio-serial port. One task reads and writes it.
#[derive(Debug)]
pub struct Duplex {
    fd: AsyncFd<OwnedFd>,
    /// Tells of room for more, from when there is none until there is.
    room: Option<AsyncFd<OwnedFd>>,
    /// There may be something to read that no event will tell of.
    look: bool,
    /// A read that brings less than it could has brought all; a virtio-serial port gives message by message.
    short_is_all: bool,
    /// What one read brought. The reader's own buffer would have to be cleared for each.
    arrived: Box<[u8]>,
    /// Slices on their way in one write; `None`: the descriptor takes them as they are.
    gathered: Option<Vec<u8>>,
}

impl Duplex {
    /// Takes the descriptor, and lets it not block. Must be called within a runtime.
    ///
    /// # Errors
    /// When the descriptor cannot be polled (a regular file).
    pub fn new(fd: impl Into<OwnedFd>) -> io::Result<Self> {
        let fd = fd.into();
        rustix::fs::fcntl_setfl(&fd, rustix::fs::OFlags::NONBLOCK)?;
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode);
        Ok(Self {
            fd: watch::watch(fd, Interest::READABLE)?,
            room: None,
            look: false,
            short_is_all: kind == FileType::Socket,
            arrived: vec![0; LARGEST].into(),
            gathered: None,
        })
    }

    /// Copies slices together before it writes them.
    #[must_use]
    pub fn gathering(mut self) -> Self {
        self.gathered = Some(Vec::new());
        self
    }

    /// Writes with `write` once there is room.
    fn poll_room<T>(
        &mut self,
        context: &mut Context<'_>,
        write: impl Fn(&OwnedFd) -> Result<T, Errno>,
    ) -> Poll<io::Result<T>> {
        loop {
            match write(self.fd.get_ref()) {
                Ok(done) => {
                    self.room = None;
                    return Poll::Ready(Ok(done));
                }
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
            let room = match &self.room {
                Some(room) => room,
                None => {
                    look_again(&mut self.look, context);
                    self.room.insert(watch::room(self.fd.get_ref())?)
                }
            };
            ready!(room.poll_write_ready(context))?.clear_ready();
            look_again(&mut self.look, context);
        }
    }
}

/// To ask for room is to look at a virtio-serial port, which may take the event of a message that has just
/// come with it (see `a3s_box_volume::guest`): the reader, of the same task, looks as well.
fn look_again(look: &mut bool, context: &Context<'_>) {
    *look = true;
    context.waker().wake_by_ref();
}

impl AsyncRead for Duplex {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if !this.look {
                // Before the read: what comes after it is another event.
                ready!(this.fd.poll_read_ready(context))?.clear_ready();
                this.look = true;
            }
            let most = buffer.remaining().min(this.arrived.len());
            match rustix::io::read(this.fd.get_ref(), &mut this.arrived[..most]) {
                Ok(count) => {
                    // A hang-up that was told of with these bytes stays readable.
                    this.look = !this.short_is_all || count == most;
                    buffer.put_slice(&this.arrived[..count]);
                    return Poll::Ready(Ok(()));
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => this.look = false,
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }
}

impl AsyncWrite for Duplex {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_room(context, |fd| rustix::io::write(fd, bytes))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let Some(mut gathered) = self.gathered.take() else {
            return self.poll_room(context, |fd| rustix::io::writev(fd, slices));
        };
        gathered.clear();
        for slice in slices {
            let room = LARGEST - gathered.len();
            gathered.extend_from_slice(&slice[..slice.len().min(room)]);
        }
        let written = self.poll_room(context, |fd| rustix::io::write(fd, &gathered));
        self.gathered = Some(gathered);
        written
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match rustix::net::shutdown(self.fd.get_ref(), rustix::net::Shutdown::Write) {
            // A port has no halves.
            Ok(()) | Err(Errno::NOTSOCK | Errno::NOTCONN) => Poll::Ready(Ok(())),
            Err(error) => Poll::Ready(Err(error.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{os::unix::net::UnixStream, time::Duration};
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        time::timeout,
    };

    const SOON: Duration = Duration::from_secs(20);

    fn pair() -> (Duplex, Duplex) {
        let (one, other) = UnixStream::pair().unwrap();
        (Duplex::new(one).unwrap(), Duplex::new(other).unwrap())
    }

    #[tokio::test]
    async fn more_than_fits_arrives_whole_both_ways_at_once() {
        let (one, other) = pair();
        let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
        let carry = |stream: Duplex, bytes: Vec<u8>| async move {
            let (mut from, mut to) = tokio::io::split(stream);
            let sent = bytes.clone();
            let sending = async move {
                to.write_all(&sent).await.unwrap();
                to.shutdown().await.unwrap();
            };
            let mut got = Vec::new();
            let (count, ()) = tokio::join!(from.read_to_end(&mut got), sending);
            assert_eq!(count.unwrap(), bytes.len());
            assert!(got == bytes);
        };
        let work = async { tokio::join!(carry(one, bytes.clone()), carry(other, bytes.clone())) };
        timeout(SOON, work).await.unwrap();
    }

    #[tokio::test]
    async fn slices_go_in_one_write_when_they_are_gathered() {
        let (one, other) = UnixStream::pair().unwrap();
        let mut one = Duplex::new(one).unwrap().gathering();
        let slices = [IoSlice::new(b"ab"), IoSlice::new(b"cd")];
        assert_eq!(one.write_vectored(&slices).await.unwrap(), 4);
        drop(one);
        let mut got = String::new();
        Duplex::new(other).unwrap().read_to_string(&mut got).await.unwrap();
        assert_eq!(got, "abcd");
    }

    #[tokio::test]
    async fn who_waits_for_room_hears_of_it_and_of_a_hang_up() {
        let (mut one, mut other) = pair();
        let filled = async {
            loop {
                one.write_all(&[7; 4096]).await?;
            }
        };
        tokio::pin!(filled);
        let first: io::Result<()> =
            timeout(Duration::from_millis(50), &mut filled).await.unwrap_or(Ok(()));
        first.unwrap();
        let mut some = [0; 100_000];
        other.read_exact(&mut some).await.unwrap();
        drop(other);
        let end: io::Result<()> = timeout(SOON, filled).await.unwrap();
        assert_eq!(end.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[tokio::test]
    async fn bytes_and_the_end_that_came_with_them_are_both_read() {
        let (one, other) = UnixStream::pair().unwrap();
        let mut one = Duplex::new(one).unwrap();
        rustix::io::write(&other, b"last words").unwrap();
        drop(other);
        let mut got = String::new();
        timeout(SOON, one.read_to_string(&mut got)).await.unwrap().unwrap();
        assert_eq!(got, "last words");
    }
}
