//! The lanes, and an exec's streams on one of them.

use crate::{
    error::{Error, Step},
    port,
    streams::{Input, Output, OutputEnd, Streams},
};
use a3s_box_api::agent::v1 as api;
use a3s_box_lane::{
    Mark,
    frame::{Kind, Reader, Writer},
};
use a3s_box_sys::duplex::Duplex;
use rustix::io::Errno;
use std::{future::poll_fn, io, sync::Arc, task::Poll};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{Mutex, OwnedMutexGuard, mpsc, watch},
};

/// Those that the machine has.
#[derive(Debug)]
pub struct Lanes(Vec<Arc<Mutex<Duplex>>>);

/// One that an exec has to itself.
#[derive(Debug)]
pub struct Lane {
    port: OwnedMutexGuard<Duplex>,
    mark: Mark,
}

impl Lanes {
    /// Opens them. Needs a runtime.
    pub fn open() -> Result<Self, Error> {
        let mut lanes = Vec::new();
        for number in 0..a3s_box_lane::COUNT {
            let name = a3s_box_lane::name(number);
            let Some(port) = port::open(&name).step(&name)? else { break };
            lanes.push(Arc::new(Mutex::new(Duplex::new(port).step(&name)?)));
        }
        Ok(Self(lanes))
    }

    /// No lanes.
    pub fn none() -> Self {
        Self(Vec::new())
    }

    /// Waits until the session before has left it, as it does when its call ends.
    pub async fn take(&self, order: &api::Lane) -> Result<Lane, Error> {
        let mark = order.mark[..].try_into();
        let mark = mark.map_err(|_| Error::invalid("the lane's mark is not 16 bytes"))?;
        let port = self.0.get(order.number as usize);
        let port = port.ok_or_else(|| {
            Error::NotNow(format!(
                "the machine has no port named {}",
                a3s_box_lane::name(order.number)
            ))
        })?;
        Ok(Lane { port: Arc::clone(port).lock_owned().await, mark })
    }
}

impl Lane {
    /// Carries a process's streams until its outputs are at their end and `ended` is true. When `caller`
    /// goes before that, the lane is left, stdin ends, and output is thrown away.
    pub async fn carry<T>(
        mut self,
        streams: Streams,
        mut ended: watch::Receiver<bool>,
        caller: mpsc::Sender<T>,
    ) {
        let Streams { mut input, mut outputs } = streams;
        // Both halves are of this task, as a port must have it.
        let (from, to) = tokio::io::split(&mut *self.port);
        let told = async {
            tell(&mut outputs, to, &self.mark, ended.clone()).await?;
            // An error: the process is gone as well.
            ended.wait_for(|ended| *ended).await.ok();
            Ok(())
        };
        let failed = tokio::select! {
            biased;
            told = told => told.err(),
            fed = feed(&mut input, from, &self.mark) => fed.err(),
            () = caller.closed() => Some(io::ErrorKind::ConnectionAborted.into()),
        };
        let Some(error) = failed else { return };
        crate::log::info(format_args!("a lane was left: {error}"));
        drop((self, input));
        for (_, output) in outputs {
            tokio::spawn(output.discard());
        }
    }
}

/// Carries what the caller says to the process; comes back only with an error.
async fn feed(
    input: &mut Input,
    from: impl AsyncRead + Unpin,
    mark: &Mark,
) -> io::Result<std::convert::Infallible> {
    let mut reader = Reader::begin(from, mark).await?;
    while let Some((kind, bytes)) = reader.next().await? {
        match kind {
            Kind::Main => input.write(bytes).await,
            Kind::End => input.close(),
            Kind::Stderr => return Err(io::ErrorKind::InvalidData.into()),
        }
    }
    Err(io::ErrorKind::UnexpectedEof.into())
}

/// Tells what the process says, to the end of all outputs, or, once `ended` is true, until nothing is left
/// of it.
async fn tell(
    outputs: &mut [(Output, OutputEnd)],
    to: impl AsyncWrite + Unpin,
    mark: &Mark,
    mut ended: watch::Receiver<bool>,
) -> io::Result<()> {
    let mut writer = Writer::begin(to, mark).await?;
    let mut sources: Vec<Source<'_>> = outputs.iter().map(Source::new).collect();
    let mut last = false;
    while !sources.is_empty() {
        let Some(at) = sources.iter().position(|source| source.more) else {
            tokio::select! {
                biased;
                () = some_ready(&mut sources) => {}
                // An error: the sender is gone, and so is the process.
                _ = ended.wait_for(|ended| *ended), if !last => {
                    last = true;
                    sources.iter_mut().for_each(|source| source.more = true);
                }
            }
            continue;
        };
        let source = &mut sources[at];
        let room = writer.room();
        match rustix::io::read(source.end.descriptor(), &mut *room) {
            Ok(count @ 1..) => {
                // What there was has been read, and more of it is an event; at the end there are none.
                source.more = last || count == room.len();
                writer.send_room(source.kind, count).await?;
                // The others come first now.
                sources.rotate_left(at + 1);
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) if !last => source.more = false,
            // That is all, unless the last key's echo is still to come. A terminal whose last user is gone says
            // EIO.
            Err(Errno::AGAIN | Errno::IO) if !source.settled => {
                source.settled = true;
                source.end.settle();
            }
            Ok(0) | Err(_) => drop(sources.remove(at)),
        }
    }
    writer.end().await
}

/// One output on its way.
struct Source<'a> {
    kind: Kind,
    end: &'a OutputEnd,
    /// There may be something to read.
    more: bool,
    /// The kernel is done with what was typed.
    settled: bool,
}

impl<'a> Source<'a> {
    fn new((output, end): &'a (Output, OutputEnd)) -> Self {
        let kind = match output {
            Output::Stdout => Kind::Main,
            Output::Stderr => Kind::Stderr,
        };
        Self { kind, end, more: false, settled: false }
    }
}

/// Waits until one of them has something to read, or its end.
async fn some_ready(sources: &mut [Source<'_>]) {
    poll_fn(|context| {
        for source in &mut *sources {
            source.more = source.end.poll_ready(context).is_ready();
        }
        match sources.iter().any(|source| source.more) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    })
    .await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::streams::{self, Stdin};
    use std::{io::Write as _, os::unix::net::UnixStream, time::Duration};
    use tokio::{io::AsyncWriteExt, time::timeout};

    const MARK: Mark = [7; 16];
    const SOON: Duration = Duration::from_secs(20);

    /// A lane's agent end, and the server's.
    async fn lane() -> (Lane, Duplex) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let lanes = Lanes(vec![Arc::new(Mutex::new(Duplex::new(theirs).unwrap()))]);
        let order = api::Lane { number: 0, mark: MARK.to_vec().into() };
        (lanes.take(&order).await.unwrap(), Duplex::new(ours).unwrap())
    }

    /// Streams, and the process's ends of them.
    fn process() -> (Streams, std::fs::File, [std::fs::File; 2]) {
        let ([stdin, stdout, stderr], streams) = streams::pipes(Stdin::Open).unwrap();
        let file = |fd: Option<std::os::fd::OwnedFd>| std::fs::File::from(fd.unwrap());
        (streams, file(stdin), [file(stdout), file(stderr)])
    }

    #[tokio::test]
    async fn an_order_of_a_lane_that_is_not_there_is_refused() {
        let lanes = Lanes::none();
        let order = |mark: &'static [u8]| api::Lane { number: 0, mark: mark.into() };
        assert!(matches!(lanes.take(&order(&[0; 16])).await, Err(Error::NotNow(_))));
        assert!(matches!(lanes.take(&order(&[0; 15])).await, Err(Error::Invalid(_))));
    }

    #[tokio::test]
    async fn streams_are_carried_both_ways_and_each_end_is_told() {
        let (lane, mut server) = lane().await;
        let (streams, stdin, [mut stdout, mut stderr]) = process();
        let (ending, ended) = watch::channel(false);
        let (caller, _answers) = mpsc::channel::<()>(1);
        let carrying = tokio::spawn(lane.carry(streams, ended, caller));

        let (from, to) = tokio::io::split(&mut server);
        let mut writer = Writer::begin(to, &MARK).await.unwrap();
        writer.send(Kind::Main, b"typed").await.unwrap();
        writer.end().await.unwrap();
        let typed = tokio::task::spawn_blocking(move || std::io::read_to_string(stdin));
        assert_eq!(timeout(SOON, typed).await.unwrap().unwrap().unwrap(), "typed");

        let mut reader = timeout(SOON, Reader::begin(from, &MARK)).await.unwrap().unwrap();
        for (output, kind) in [(&mut stdout, Kind::Main), (&mut stderr, Kind::Stderr)] {
            output.write_all(b"said").unwrap();
            let (got, bytes) = timeout(SOON, reader.next()).await.unwrap().unwrap().unwrap();
            assert_eq!((got, bytes), (kind, &b"said"[..]));
        }
        // Somebody still has stdout when the process has ended: what was said before is told, and the end.
        stdout.write_all(b"last").unwrap();
        drop(stderr);
        ending.send_replace(true);
        let (got, bytes) = timeout(SOON, reader.next()).await.unwrap().unwrap().unwrap();
        assert_eq!((got, bytes), (Kind::Main, &b"last"[..]));
        assert_eq!(timeout(SOON, reader.next()).await.unwrap().unwrap().unwrap().0, Kind::End);
        timeout(SOON, carrying).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_caller_who_goes_frees_the_lane_and_stops_no_process() {
        let (lane, mut server) = lane().await;
        let (streams, stdin, [mut stdout, stderr]) = process();
        let (_ending, ended) = watch::channel(false);
        let (caller, answers) = mpsc::channel::<()>(1);
        let carrying = tokio::spawn(lane.carry(streams, ended, caller));
        server.write_all(&MARK).await.unwrap();
        // More than pipe, lane and both buffers hold: nobody reads.
        let writing = tokio::task::spawn_blocking(move || {
            (0..400).try_for_each(|_| stdout.write_all(&[b'x'; 4096]))
        });
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!writing.is_finished());
        drop(answers);
        timeout(SOON, carrying).await.unwrap().unwrap();
        timeout(SOON, writing).await.unwrap().unwrap().unwrap();
        let typed = tokio::task::spawn_blocking(move || std::io::read_to_string(stdin));
        assert_eq!(timeout(SOON, typed).await.unwrap().unwrap().unwrap(), "");
        drop(stderr);
    }
}
