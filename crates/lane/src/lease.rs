//! Who has which lane: the shim lends them over a socket of its own, with the descriptor. A lane is back
//! when the borrower's connection ends, however that comes.

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use std::{
    collections::BTreeMap,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream as StdUnixStream,
    },
    sync::{Mutex, PoisonError},
};
use tokio::{
    io::{AsyncReadExt, Interest},
    net::UnixStream,
};

/// A machine's lanes, to be lent.
#[derive(Debug)]
pub struct Lender {
    free: Mutex<BTreeMap<u8, StdUnixStream>>,
}

impl Lender {
    /// The host's ends, in the order of their numbers.
    pub fn new(lanes: Vec<StdUnixStream>) -> Self {
        Self { free: Mutex::new((0..).zip(lanes).collect()) }
    }

    /// Lends a lane to who has connected and waits for it to come back. Without a free one it hangs up.
    ///
    /// # Errors
    /// The connection's; the lane is then free again.
    pub async fn lend(&self, mut borrower: UnixStream) -> io::Result<()> {
        let Some(lent) = Lent::take(self) else { return Ok(()) };
        borrower.async_io(Interest::WRITABLE, || send(&borrower, &lent)).await?;
        while borrower.read(&mut [0; 16]).await? > 0 {}
        Ok(())
    }

    fn free(&self) -> std::sync::MutexGuard<'_, BTreeMap<u8, StdUnixStream>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A lane that is away.
struct Lent<'a> {
    lender: &'a Lender,
    lane: Option<(u8, StdUnixStream)>,
}

impl<'a> Lent<'a> {
    fn take(lender: &'a Lender) -> Option<Self> {
        let lane = lender.free().pop_first()?;
        Some(Self { lender, lane: Some(lane) })
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        self.lender.free().extend(self.lane.take());
    }
}

/// A borrowed lane; it goes back when this is dropped.
#[derive(Debug)]
pub struct Lane {
    /// Its number, by which the guest knows it.
    pub number: u32,
    /// The host's end, which does not block.
    pub stream: OwnedFd,
    /// As long as this is open the lane is ours.
    pub lease: UnixStream,
}

/// Borrows a lane from the shim that `shim` is connected to; `None`: all are lent, or there are none.
///
/// # Errors
/// The connection's.
pub async fn borrow(shim: UnixStream) -> io::Result<Option<Lane>> {
    let received = shim.async_io(Interest::READABLE, || receive(&shim)).await?;
    Ok(received.map(|(number, stream)| Lane { number: number.into(), stream, lease: shim }))
}

fn send(borrower: &UnixStream, lent: &Lent<'_>) -> io::Result<()> {
    let Some((number, stream)) = &lent.lane else { return Ok(()) };
    let fds = [stream.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut message = SendAncillaryBuffer::new(&mut space);
    if !message.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other("no room for the descriptor"));
    }
    sendmsg(borrower, &[IoSlice::new(&[*number])], &mut message, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn receive(shim: &UnixStream) -> io::Result<Option<(u8, OwnedFd)>> {
    let mut number = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut message = RecvAncillaryBuffer::new(&mut space);
    let into = &mut [IoSliceMut::new(&mut number)];
    if recvmsg(shim, into, &mut message, RecvFlags::CMSG_CLOEXEC)?.bytes == 0 {
        return Ok(None);
    }
    for part in message.drain() {
        if let RecvAncillaryMessage::ScmRights(mut fds) = part
            && let Some(fd) = fds.next()
        {
            return Ok(Some((number[0], fd)));
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "a lane came without its descriptor"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{Read, Write},
        sync::Arc,
        time::Duration,
    };

    /// A lender of two lanes, and their far ends.
    fn lender() -> (Arc<Lender>, Vec<StdUnixStream>) {
        let (near, far) = (0..2).map(|_| StdUnixStream::pair().unwrap()).unzip();
        (Arc::new(Lender::new(near)), far)
    }

    async fn borrow_from(lender: &Arc<Lender>) -> Option<Lane> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let lender = lender.clone();
        tokio::spawn(async move { lender.lend(theirs).await });
        borrow(ours).await.unwrap()
    }

    #[tokio::test]
    async fn a_lane_is_one_borrowers_until_he_hangs_up() {
        let (lender, mut far) = lender();
        let first = borrow_from(&lender).await.unwrap();
        let second = borrow_from(&lender).await.unwrap();
        assert_eq!((first.number, second.number), (0, 1));
        assert!(borrow_from(&lender).await.is_none());

        let mut stream = StdUnixStream::from(first.stream.try_clone().unwrap());
        stream.write_all(b"to the guest").unwrap();
        drop((stream, first));
        let again = loop {
            match borrow_from(&lender).await {
                Some(lane) => break lane,
                None => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        };
        assert_eq!(again.number, 0);
        // The port itself was never closed.
        far[0].set_nonblocking(true).unwrap();
        let mut got = [0; 20];
        assert_eq!(far[0].read(&mut got).unwrap(), 12);
        assert_eq!(far[0].read(&mut got).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
