//! The lanes, and an exec's streams on one of them.
//!
//! Threads carry the bytes, and wait where the kernel makes them wait: a key on a terminal then costs four calls
//! and nobody's event loop (decisions/0017). A lane has a thread that hears, from its first session on; a session
//! has a thread for each output. A terminal's come before everything else in the guest. Whoever is to stop is told
//! so, and interrupted until it has.

use crate::{
    error::{Error, Step},
    port,
    streams::{BlockingInput, Output, OutputEnd, Streams, settle, write_all},
};
use a3s_box_api::agent::v1 as api;
use a3s_box_lane::{
    Mark,
    frame::{Frame, Kind, Parser},
};
use a3s_box_sys::interrupt::Interrupt;
use rustix::{fd::OwnedFd, io::Errno};
use std::{
    convert::Infallible,
    io,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};
use tokio::sync::{self, Notify, OwnedMutexGuard, mpsc, oneshot, watch};

/// How soon a thread is interrupted again that has not stopped yet, and at the latest: it may be its host's reader
/// who does not take what there is.
const AGAIN: Duration = Duration::from_millis(5);
const AGAIN_LATEST: Duration = Duration::from_secs(1);
const STACK: usize = 64 << 10;

/// Those that the machine has.
#[derive(Debug)]
pub struct Lanes(Vec<Arc<sync::Mutex<Arc<Port>>>>);

/// One that an exec has to itself.
#[derive(Debug)]
pub struct Lane {
    port: OwnedMutexGuard<Arc<Port>>,
    mark: Mark,
}

/// A port, which blocks.
#[derive(Debug)]
struct Port {
    fd: OwnedFd,
    /// Whom its host means.
    session: Mutex<Option<Arc<Session>>>,
    /// There is somebody.
    taken: Condvar,
    /// Its listener.
    listener: Interrupt,
    listens: AtomicBool,
}

/// What the threads of an exec share.
#[derive(Debug)]
struct Session {
    port: Arc<Port>,
    mark: Mark,
    /// Somebody types and waits to see it.
    terminal: bool,
    input: Mutex<BlockingInput>,
    /// Who says what comes out; holds whether the mark has been said.
    speech: Mutex<bool>,
    /// Outputs that are not at their end.
    open: AtomicUsize,
    /// One for each output.
    tellers: Vec<Interrupt>,
    /// The process has ended: what it has written is all.
    ended: AtomicBool,
    /// Nobody hears or speaks any more.
    left: AtomicBool,
    /// What the host sends makes no sense, or there is no host.
    broken: Notify,
}

impl Lanes {
    /// Opens them.
    pub fn open() -> Result<Self, Error> {
        let mut lanes = Vec::new();
        for number in 0..a3s_box_lane::COUNT {
            let name = a3s_box_lane::name(number);
            let Some(port) = port::open(&name).step(&name)? else { break };
            lanes.push(port.into());
        }
        Ok(Self::of(lanes))
    }

    /// No lanes.
    pub fn none() -> Self {
        Self(Vec::new())
    }

    fn of(ports: Vec<OwnedFd>) -> Self {
        let lane = |fd| {
            let (session, taken) = (Mutex::default(), Condvar::new());
            let (listener, listens) = (Interrupt::default(), AtomicBool::new(false));
            Arc::new(sync::Mutex::new(Arc::new(Port { fd, session, taken, listener, listens })))
        };
        Self(ports.into_iter().map(lane).collect())
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
    /// Carries a process's streams until its outputs are at their end and `ended` is true, which the future waits
    /// for. When `caller` goes before that, the lane is left, stdin ends, and output is thrown away, whoever waits.
    pub fn carry<T: Send + 'static>(
        self,
        streams: Streams,
        ended: watch::Receiver<bool>,
        caller: mpsc::Sender<T>,
    ) -> Result<impl Future<Output = ()> + Send + 'static, Error> {
        let session = Arc::new(Session {
            port: Arc::clone(&self.port),
            mark: self.mark,
            terminal: streams.input.is_terminal(),
            input: Mutex::new(streams.input.blocking()?),
            speech: Mutex::new(false),
            open: AtomicUsize::new(streams.outputs.len()),
            tellers: streams.outputs.iter().map(|_| Interrupt::default()).collect(),
            ended: AtomicBool::new(false),
            left: AtomicBool::new(false),
            broken: Notify::new(),
        });
        let rests = session.start(streams.outputs).inspect_err(|_| {
            session.left.store(true, Ordering::SeqCst);
        })?;
        // A task of its own: threads are not stopped by dropping who waits for them.
        let done = tokio::spawn(attend(self, session, rests, ended, caller));
        Ok(async move { done.await.unwrap_or_default() })
    }
}

/// Sees to a session's end.
async fn attend<T>(
    lane: Lane,
    session: Arc<Session>,
    rests: Vec<Rest>,
    mut ended: watch::Receiver<bool>,
    caller: mpsc::Sender<T>,
) {
    let told = async {
        let mut left_open = Vec::new();
        for rest in rests {
            // An error: the thread is gone, and with it the output.
            left_open.extend(rest.await.ok().flatten());
        }
        left_open
    };
    tokio::pin!(told);
    let carried = async {
        // An error: the process is gone as well.
        drop(ended.wait_for(|ended| *ended).await);
        session.ended.store(true, Ordering::SeqCst);
        session.interrupted(&mut told).await
    };
    let carried = tokio::select! {
        biased;
        outputs = carried => Ok(outputs),
        () = session.broken.notified() => Err("it broke"),
        () = caller.closed() => Err("the caller is gone"),
    };
    session.left.store(true, Ordering::SeqCst);
    session.port.session().take();
    let outputs = match carried {
        Ok(outputs) => outputs,
        Err(why) => {
            crate::log::info(format_args!("a lane was left: {why}"));
            session.interrupted(told).await
        }
    };
    session.give_up_input().await;
    drop(lane);
    for output in outputs {
        // It cannot be watched: then its writers hear that nobody reads.
        if let Ok(output) = OutputEnd::new(output) {
            tokio::spawn(output.discard());
        }
    }
}

impl Port {
    /// From now on the host means this session.
    fn hear(self: &Arc<Self>, session: &Arc<Session>) -> Result<(), Error> {
        // Whoever has the lane is alone here.
        if !self.listens.load(Ordering::SeqCst) {
            let port = Arc::clone(self);
            start("listener", move || match port.listen() {})?;
            self.listens.store(true, Ordering::SeqCst);
        }
        *self.session() = Some(Arc::clone(session));
        self.taken.notify_one();
        Ok(())
    }

    fn session(&self) -> MutexGuard<'_, Option<Arc<Session>>> {
        lock(&self.session)
    }

    /// Waits for somebody, and somebody else than `before`.
    fn meant(&self, before: Option<&Arc<Session>>) -> Arc<Session> {
        let mut session = self.session();
        loop {
            match &*session {
                Some(session) if before.is_none_or(|before| !Arc::ptr_eq(before, session)) => {
                    return Arc::clone(session);
                }
                _ => {}
            }
            session = self.taken.wait(session).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn listen(&self) -> Infallible {
        let _here = self.listener.here();
        let mut heard = self.meant(None);
        let mut parser = Parser::new(&heard.mark);
        urgent(heard.terminal);
        loop {
            let came = rustix::io::read(&self.fd, parser.room());
            let next = match came {
                Ok(count @ 1..) => {
                    parser.came(count);
                    // The session may have ended while nothing came, and this is what another one begins with.
                    self.meant(None)
                }
                Err(Errno::INTR) => continue,
                // There is no host. The next session may have one.
                Ok(0) | Err(_) => {
                    heard.broken.notify_one();
                    self.meant(Some(&heard))
                }
            };
            if !Arc::ptr_eq(&heard, &next) {
                parser.begin(&next.mark);
                heard = next;
                urgent(heard.terminal);
            }
            if let Err(error) = heard.hear(&mut parser) {
                crate::log::error(format_args!("lane: {error}"));
                // Nothing is of this session any more, and there is room again.
                parser.begin(&heard.mark);
                parser.begun().ok();
                heard.broken.notify_one();
            }
        }
    }
}

/// What a teller gives back in the end, see [`Session::tell`].
type Rest = oneshot::Receiver<Option<OwnedFd>>;

impl Session {
    fn start(self: &Arc<Self>, outputs: Vec<(Output, OutputEnd)>) -> Result<Vec<Rest>, Error> {
        let mut rests = Vec::new();
        for (number, (output, end)) in outputs.into_iter().enumerate() {
            let kind = match output {
                Output::Stdout => Kind::Main,
                Output::Stderr => Kind::Stderr,
            };
            let (output, session) = (end.blocking()?, Arc::clone(self));
            let (told, rest) = oneshot::channel();
            start("teller", move || {
                told.send(session.tell(number, kind, output)).ok();
            })?;
            rests.push(rest);
        }
        self.port.hear(self)?;
        Ok(rests)
    }

    /// Passes on what has come of stdin.
    fn hear(&self, parser: &mut Parser) -> io::Result<()> {
        let mut input = lock(&self.input);
        while let Some((kind, bytes)) = parser.frame()? {
            match kind {
                Kind::Main => input.write(bytes, || self.left()),
                Kind::End => input.close(),
                Kind::Stderr => return Err(io::ErrorKind::InvalidData.into()),
            }
        }
        Ok(())
    }

    /// Tells what the process says on one output to the end of it, or, once the process has ended, until nothing is
    /// left of it. The output, when it is not at its end.
    fn tell(&self, number: usize, kind: Kind, output: OwnedFd) -> Option<OwnedFd> {
        let _here = self.tellers[number].here();
        urgent(self.terminal);
        let mut frame = Frame::default();
        let rest = self.tell_all(kind, &output, &mut frame);
        if self.open.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.say(frame.bytes(Kind::End, 0));
        }
        rest.then_some(output)
    }

    /// Whether there may be more, for somebody else.
    fn tell_all(&self, kind: Kind, output: &OwnedFd, frame: &mut Frame) -> bool {
        let (mut last, mut settled) = (false, false);
        while !self.left() {
            if !last && self.ended.load(Ordering::SeqCst) {
                last = rustix::fs::fcntl_setfl(output, rustix::fs::OFlags::NONBLOCK).is_ok();
            }
            match rustix::io::read(output, frame.room()) {
                Ok(count @ 1..) => self.say(frame.bytes(kind, count)),
                Err(Errno::INTR) => {}
                // That is all, unless the last key's echo is still to come. A terminal whose last user is gone says
                // EIO.
                Err(Errno::AGAIN | Errno::IO) if !settled => {
                    settled = true;
                    settle(output);
                }
                Err(Errno::AGAIN) => return true,
                Ok(0) | Err(_) => return false,
            }
        }
        true
    }

    /// Says all of it, or as much as until the session is left.
    fn say(&self, bytes: &[u8]) {
        let mut begun = lock(&self.speech);
        if !*begun {
            *begun = self.write(&self.mark);
        }
        if *begun {
            self.write(bytes);
        }
    }

    /// Whether the host has got all of it, or will. Where there is no host, there is no caller either.
    fn write(&self, bytes: &[u8]) -> bool {
        write_all(&self.port.fd, bytes, || self.left()).is_ok()
    }

    fn left(&self) -> bool {
        self.left.load(Ordering::SeqCst)
    }

    /// Calls the tellers out of what they wait for, again and again, until `told`.
    async fn interrupted<T>(&self, mut told: impl Future<Output = T> + Unpin) -> T {
        let mut pause = AGAIN;
        loop {
            self.tellers.iter().for_each(Interrupt::send);
            if let Ok(told) = tokio::time::timeout(pause, &mut told).await {
                return told;
            }
            pause = AGAIN_LATEST.min(2 * pause);
        }
    }

    /// Ends stdin, when its writer has noticed that the session was left.
    async fn give_up_input(&self) {
        loop {
            if let Ok(mut input) = self.input.try_lock() {
                *input = BlockingInput::default();
                return;
            }
            self.port.listener.send();
            tokio::time::sleep(AGAIN).await;
        }
    }
}

fn start(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), Error> {
    let thread = thread::Builder::new().name(name.to_owned()).stack_size(STACK);
    thread.spawn(work).map(drop).step(name)
}

/// The calling thread comes first, or in its turn. It may have to wait then, that is all.
fn urgent(urgent: bool) {
    a3s_box_sys::priority::urgent(urgent).ok();
}

/// What a thread that panicked has left is as good as before.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::streams::{self, Stdin};
    use a3s_box_lane::frame::{Reader, Writer};
    use a3s_box_sys::duplex::Duplex;
    use std::{io::Write as _, os::unix::net::UnixStream};
    use tokio::{io::AsyncWriteExt, time::timeout};

    const MARK: Mark = [7; 16];
    const SOON: Duration = Duration::from_secs(20);

    /// A lane's agent end, and the server's.
    async fn lane() -> (Lane, Duplex) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let lanes = Lanes::of(vec![theirs.into()]);
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
        let carrying = tokio::spawn(lane.carry(streams, ended, caller).unwrap());

        let (from, to) = tokio::io::split(&mut server);
        let mut writer = Writer::begin(to, &MARK).await.unwrap();
        writer.send(Kind::Main, b"typed").await.unwrap();
        writer.end().await.unwrap();
        let typed = tokio::task::spawn_blocking(move || std::io::read_to_string(stdin));
        assert_eq!(timeout(SOON, typed).await.unwrap().unwrap().unwrap(), "typed");

        // The mark comes with what is said first.
        stdout.write_all(b"said").unwrap();
        let mut reader = timeout(SOON, Reader::begin(from, &MARK)).await.unwrap().unwrap();
        for kind in [Kind::Main, Kind::Stderr] {
            let (got, bytes) = timeout(SOON, reader.next()).await.unwrap().unwrap().unwrap();
            assert_eq!((got, bytes), (kind, &b"said"[..]));
            stderr.write_all(b"said").unwrap();
        }
        let (got, bytes) = timeout(SOON, reader.next()).await.unwrap().unwrap().unwrap();
        assert_eq!((got, bytes), (Kind::Stderr, &b"said"[..]));
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
        let carrying = tokio::spawn(lane.carry(streams, ended, caller).unwrap());
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

    /// A session that ends when its caller goes.
    fn carry(
        lane: Lane,
        streams: Streams,
    ) -> (tokio::task::JoinHandle<()>, mpsc::Receiver<()>, watch::Sender<bool>) {
        let (ending, ended) = watch::channel(false);
        let (caller, answers) = mpsc::channel(1);
        (tokio::spawn(lane.carry(streams, ended, caller).unwrap()), answers, ending)
    }

    #[tokio::test]
    async fn a_session_hears_nothing_that_was_meant_for_the_one_before() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (lanes, mut server) = (Lanes::of(vec![theirs.into()]), Duplex::new(ours).unwrap());
        for number in 0..3 {
            let mark = [number; 16];
            let order = api::Lane { number: 0, mark: mark.to_vec().into() };
            let (streams, stdin, _outputs) = process();
            let (carrying, answers, _ending) = carry(lanes.take(&order).await.unwrap(), streams);
            let mut writer = Writer::begin(&mut server, &mark).await.unwrap();
            let typed = format!("typed {number}");
            writer.send(Kind::Main, typed.as_bytes()).await.unwrap();
            writer.end().await.unwrap();
            let read = tokio::task::spawn_blocking(move || std::io::read_to_string(stdin));
            assert_eq!(timeout(SOON, read).await.unwrap().unwrap().unwrap(), typed);
            // Too late, and half a frame.
            server.write_all(&[0, 0, 0, 9, b'x']).await.unwrap();
            drop(answers);
            timeout(SOON, carrying).await.unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn a_process_that_does_not_read_holds_nobody_up() {
        let (lane, mut server) = lane().await;
        let (streams, stdin, _outputs) = process();
        let (carrying, answers, _ending) = carry(lane, streams);
        server.write_all(&MARK).await.unwrap();
        let frame = [&[0, 0, 0x20, 0][..], &[b'x'; 0x2000]].concat();
        let mut writes = tokio::task::spawn(async move {
            while server.write_all(&frame).await.is_ok() {}
            server
        });
        // Pipe, buffers and lane are full by then, or will be: the listener waits in a write either way.
        timeout(Duration::from_millis(200), &mut writes).await.unwrap_err();
        drop(answers);
        timeout(SOON, carrying).await.unwrap().unwrap();
        writes.abort();
        drop(stdin);
    }

    #[tokio::test]
    async fn nonsense_ends_the_session() {
        let (lane, mut server) = lane().await;
        let (streams, stdin, _outputs) = process();
        let (carrying, _answers, _ending) = carry(lane, streams);
        server.write_all(&[&MARK[..], &[9; 8]].concat()).await.unwrap();
        timeout(SOON, carrying).await.unwrap().unwrap();
        let read = tokio::task::spawn_blocking(move || std::io::read_to_string(stdin));
        assert_eq!(timeout(SOON, read).await.unwrap().unwrap().unwrap(), "");
    }
}
