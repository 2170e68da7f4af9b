//! What happens to sandboxes and containers, on its way to those who listen.
//!
//! A thing is created, started, stopped and deleted, each once, and each is told once, also across
//! servers. A journal in the state folder has what was told of each thing, or was nobody's to hear
//! because nobody listened. At its start, a server compares it with the records and what the shims say;
//! what is missing there happened while no server ran, or just before the last one died. It is held, with
//! what happens meanwhile, for the first who listens:
//!
//! ```text
//! Recovering --records read--> Holding --somebody listens, or nobody for a while--> Live
//!                                 ^______a listener left before it took all_________/
//! ```
//!
//! An event counts as told when it is taken for the wire. A server killed in that moment tells it again;
//! one killed between a removal and its telling does not tell that removal.

use crate::status::chain;
use a3s_box_types::{ContainerId, SandboxId};
use std::{
    collections::{HashMap, HashSet, VecDeque},
    fs::{self, File},
    io::{self, Write},
    mem,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Events that a listener may be behind; one that is further behind is told so.
const BEHIND: usize = 1024;
/// Events that are held for a listener.
const HELD: usize = 1024;
/// How long they are.
const HOLD: Duration = Duration::from_secs(300);
/// Lines of the journal beyond those that mean something.
const OLD_LINES: usize = 4096;

/// Something kubelet may want to hear of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Happening {
    /// In which sandbox.
    pub sandbox: SandboxId,
    /// To which container; `None`: to the sandbox itself.
    pub container: Option<ContainerId>,
    /// What.
    pub kind: HappeningKind,
    /// Unix nanoseconds.
    pub at: i64,
}

/// What happened, in the order of a life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum HappeningKind {
    /// It was made.
    Created,
    /// It runs.
    Started,
    /// It ended.
    Stopped,
    /// It is gone.
    Deleted,
}

const WORDS: [(&str, HappeningKind); 4] = [
    ("created", HappeningKind::Created),
    ("started", HappeningKind::Started),
    ("stopped", HappeningKind::Stopped),
    ("deleted", HappeningKind::Deleted),
];

impl Happening {
    /// The id of what it happened to.
    pub fn subject(&self) -> &str {
        self.container.as_ref().map_or(self.sandbox.as_str(), ContainerId::as_str)
    }
}

/// The way from drivers to listeners. One for each server.
pub struct Events {
    inner: Mutex<Inner>,
    live: broadcast::Sender<Happening>,
    closed: CancellationToken,
}

struct Inner {
    phase: Phase,
    /// The last that happened to each thing, told or on its way.
    seen: HashMap<String, HappeningKind>,
    journal: Journal,
}

enum Phase {
    Recovering(Vec<Happening>),
    Holding { held: VecDeque<Happening>, since: Instant },
    Live,
}

impl Events {
    /// With the journal in that file.
    pub fn open(journal: PathBuf) -> io::Result<Self> {
        let journal = Journal::open(journal)?;
        let inner =
            Inner { phase: Phase::Recovering(Vec::new()), seen: journal.told.clone(), journal };
        Ok(Self {
            inner: Mutex::new(inner),
            live: broadcast::channel(BEHIND).0,
            closed: CancellationToken::new(),
        })
    }

    /// Tells it to all who listen. What is known to have happened is not told again, and nothing is told
    /// of what never was made.
    pub fn tell(&self, happening: Happening) {
        let mut inner = self.lock();
        let known = inner.seen.get(happening.subject()).copied();
        let news = match known {
            None => happening.kind == HappeningKind::Created,
            Some(last) => happening.kind > last,
        };
        if let Phase::Recovering(gone) = &mut inner.phase {
            // The rest is in the records, and found there in its order.
            if news && happening.kind == HappeningKind::Deleted {
                gone.push(happening);
            }
            return;
        }
        if !news {
            return;
        }
        inner.saw(&happening);
        inner.give_up_waiting();
        match &mut inner.phase {
            Phase::Holding { held, .. } => held.push_back(happening),
            // An error says that nobody listens.
            _ => {
                if let Err(unheard) = self.live.send(happening) {
                    inner.journal.note(&unheard.0);
                }
            }
        }
    }

    /// What a former server left is known: all that happened to each thing that is there, in its order.
    pub fn recovered(&self, happened: Vec<Happening>) {
        let mut inner = self.lock();
        let Phase::Recovering(gone) = mem::replace(&mut inner.phase, Phase::Live) else { return };
        let things: HashSet<String> =
            happened.iter().chain(&gone).map(|one| one.subject().to_owned()).collect();
        let fresh = inner.journal.is_new;
        let mut held = Vec::new();
        for one in happened.into_iter().chain(gone) {
            if inner.journal.told.get(one.subject()).is_some_and(|last| one.kind <= *last) {
                continue;
            }
            inner.saw(&one);
            // Without a journal nobody knows what was told.
            if fresh { inner.journal.note(&one) } else { held.push(one) }
        }
        held.sort_by_key(|one| one.at);
        if !held.is_empty() {
            info!(events = held.len(), "held for who listens first");
        }
        inner.seen.retain(|id, _| things.contains(id));
        inner.journal.keep_only(&things);
        inner.phase = Phase::Holding { held: held.into(), since: Instant::now() };
    }

    /// From now on, and what was held.
    pub fn listen(self: &Arc<Self>) -> Listener {
        let mut inner = self.lock();
        inner.give_up_waiting();
        let held = match mem::replace(&mut inner.phase, Phase::Live) {
            Phase::Holding { held, .. } => held,
            other => {
                inner.phase = other;
                VecDeque::new()
            }
        };
        Listener { held, live: self.live.subscribe(), events: self.clone() }
    }

    /// How many listen.
    pub fn listeners(&self) -> usize {
        self.live.receiver_count()
    }

    /// Ends all listeners' streams.
    pub fn close(&self) {
        self.closed.cancel();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic while it was held left plain data, whole at every statement.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn saw(&mut self, happening: &Happening) {
        advance(&mut self.seen, happening.subject(), happening.kind);
    }

    /// Nobody came to hear what is held: it was nobody's to hear.
    fn give_up_waiting(&mut self) {
        let Phase::Holding { held, since } = &mut self.phase else { return };
        if held.len() < HELD && since.elapsed() < HOLD {
            return;
        }
        for unheard in mem::take(held) {
            self.journal.note(&unheard);
        }
        self.phase = Phase::Live;
    }
}

/// One who listens.
pub struct Listener {
    held: VecDeque<Happening>,
    live: broadcast::Receiver<Happening>,
    events: Arc<Events>,
}

/// A listener did not keep up and has missed so many events.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the listener is too slow and has missed {0} events: list anew")]
pub struct Missed(pub u64);

impl Listener {
    /// The next event, which counts as told; `None` when the server ends.
    pub async fn next(&mut self) -> Option<Result<Happening, Missed>> {
        let happening = match self.held.pop_front() {
            Some(happening) => happening,
            None => {
                let next = tokio::select! {
                    () = self.events.closed.cancelled() => return None,
                    next = self.live.recv() => next,
                };
                match next {
                    Ok(happening) => happening,
                    Err(broadcast::error::RecvError::Lagged(missed)) => {
                        return Some(Err(Missed(missed)));
                    }
                    Err(broadcast::error::RecvError::Closed) => return None,
                }
            }
        };
        self.events.lock().journal.note(&happening);
        Some(Ok(happening))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let mut inner = self.events.lock();
        // Others have heard what came live.
        let alone = self.events.live.receiver_count() == 1;
        if alone && !self.held.is_empty() && matches!(inner.phase, Phase::Live) {
            let mut held = mem::take(&mut self.held);
            while let Ok(more) = self.live.try_recv() {
                held.push_back(more);
            }
            inner.phase = Phase::Holding { held, since: Instant::now() };
        }
    }
}

/// The file of what was told: a line for each event, an id and a word.
struct Journal {
    path: PathBuf,
    file: File,
    told: HashMap<String, HappeningKind>,
    lines: usize,
    /// The file was not there.
    is_new: bool,
}

impl Journal {
    fn open(path: PathBuf) -> io::Result<Self> {
        let (text, is_new) = match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => (String::new(), true),
            text => (text?, false),
        };
        let mut told = HashMap::new();
        // A server that died while it wrote leaves half a line.
        for line in text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
            let known = line.split_once(' ').and_then(|(id, word)| {
                let (_, kind) = WORDS.iter().find(|(known, _)| *known == word)?;
                Some((id, *kind))
            });
            match known {
                Some((id, kind)) => advance(&mut told, id, kind),
                None => warn!(line, "not an event; left out"),
            }
        }
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let file = write_anew(&path, &told)?;
        Ok(Self { path, file, lines: told.len(), told, is_new })
    }

    fn note(&mut self, happening: &Happening) {
        let (id, kind) = (happening.subject(), happening.kind);
        if self.told.get(id).is_some_and(|last| kind <= *last) {
            return;
        }
        advance(&mut self.told, id, kind);
        self.lines += 1;
        let written = if self.lines > self.told.len() + OLD_LINES {
            self.shorten()
        } else {
            self.file.write_all(line(id, kind).as_bytes())
        };
        if let Err(error) = written {
            warn!(path = %self.path.display(), "cannot note an event: {}", chain(&error));
        }
    }

    fn keep_only(&mut self, things: &HashSet<String>) {
        self.told.retain(|id, _| things.contains(id));
        if let Err(error) = self.shorten() {
            warn!(path = %self.path.display(), "cannot shorten: {}", chain(&error));
        }
    }

    fn shorten(&mut self) -> io::Result<()> {
        self.file = write_anew(&self.path, &self.told)?;
        self.lines = self.told.len();
        Ok(())
    }
}

/// Of what is gone nothing more can happen.
fn advance(last: &mut HashMap<String, HappeningKind>, id: &str, kind: HappeningKind) {
    if kind == HappeningKind::Deleted {
        last.remove(id);
    } else {
        last.insert(id.to_owned(), kind);
    }
}

fn line(id: &str, kind: HappeningKind) -> String {
    let word = WORDS.iter().find(|(_, known)| *known == kind).map_or("", |(word, _)| word);
    format!("{id} {word}\n")
}

/// A whole file or the old one; the server's death takes nothing back that was written.
fn write_anew(path: &Path, told: &HashMap<String, HappeningKind>) -> io::Result<File> {
    let temporary = path.with_extension("new");
    let mut file = File::create(&temporary)?;
    let text: String = told.iter().map(|(id, kind)| line(id, *kind)).collect();
    file.write_all(text.as_bytes())?;
    fs::rename(&temporary, path)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::{HappeningKind::*, *};

    struct Server(tempfile::TempDir);

    impl Server {
        fn new() -> Self {
            let server = Self(tempfile::tempdir().unwrap());
            // Without a journal nothing is held.
            drop(server.start(Vec::new()));
            server
        }

        /// A server starts, which finds that this has happened.
        fn start(&self, happened: Vec<Happening>) -> Arc<Events> {
            let events = Events::open(self.0.path().join("told")).unwrap();
            events.recovered(happened);
            Arc::new(events)
        }
    }

    fn at(time: i64, kind: HappeningKind) -> Happening {
        let sandbox = SandboxId::from_random([1; 32]);
        Happening { sandbox, container: None, kind, at: time }
    }

    fn of(container: u8, time: i64, kind: HappeningKind) -> Happening {
        let container = Some(ContainerId::from_random([container; 32]));
        Happening { container, ..at(time, kind) }
    }

    /// What it would be told without waiting.
    fn all(listener: &mut Listener) -> Vec<Happening> {
        use futures::FutureExt;
        let mut told = Vec::new();
        while let Some(Some(Ok(happening))) = listener.next().now_or_never() {
            told.push(happening);
        }
        told
    }

    #[tokio::test]
    async fn every_listener_hears_each_event_once() {
        let events = Server::new().start(Vec::new());
        let (mut a, mut b) = (events.listen(), events.listen());
        let life = [at(1, Created), at(2, Started), at(3, Stopped), at(4, Deleted)];
        for happening in &life {
            events.tell(happening.clone());
            events.tell(happening.clone());
        }
        assert_eq!(all(&mut a), life);
        assert_eq!(all(&mut b), life);
    }

    #[tokio::test]
    async fn what_happened_while_no_server_ran_is_told_once_and_in_order() {
        let node = Server::new();
        let first = node.start(Vec::new());
        let mut listener = first.listen();
        first.tell(at(1, Created));
        first.tell(of(2, 5, Created));
        assert_eq!(all(&mut listener).len(), 2);
        let found = || {
            vec![
                at(1, Created),
                at(9, Stopped),
                of(2, 5, Created),
                of(2, 6, Started),
                of(2, 8, Stopped),
            ]
        };
        let missed = [of(2, 6, Started), of(2, 8, Stopped), at(9, Stopped)];
        // A second server dies before anybody listens.
        drop(node.start(found()));
        let third = node.start(found());
        assert_eq!(all(&mut third.listen()), missed);
        third.tell(of(2, 8, Stopped));
        assert_eq!(all(&mut third.listen()), []);
        assert_eq!(all(&mut node.start(found()).listen()), []);
    }

    #[tokio::test]
    async fn what_a_listener_did_not_take_is_told_by_the_next_server_and_held_for_the_next_listener()
     {
        let node = Server::new();
        let events = node.start(Vec::new());
        let mut listener = events.listen();
        events.tell(at(1, Created));
        events.tell(at(2, Started));
        assert_eq!(listener.next().await, Some(Ok(at(1, Created))));
        let next = node.start(vec![at(1, Created), at(2, Started), at(3, Stopped)]);
        let mut listener = next.listen();
        assert_eq!(listener.next().await, Some(Ok(at(2, Started))));
        drop(listener);
        assert_eq!(all(&mut next.listen()), [at(3, Stopped)]);
    }

    #[tokio::test]
    async fn what_happens_while_nobody_listens_is_nobodys() {
        let node = Server::new();
        let events = node.start(Vec::new());
        drop(events.listen());
        events.tell(at(1, Created));
        assert_eq!(all(&mut events.listen()), []);
        assert_eq!(all(&mut node.start(vec![at(1, Created)]).listen()), []);
    }

    #[tokio::test]
    async fn a_server_without_a_journal_tells_nothing_of_the_past() {
        let folder = tempfile::tempdir().unwrap();
        let events = Arc::new(Events::open(folder.path().join("told")).unwrap());
        events.recovered(vec![at(1, Created)]);
        let mut listener = events.listen();
        events.tell(at(2, Started));
        assert_eq!(all(&mut listener), [at(2, Started)]);
    }

    #[tokio::test]
    async fn a_listener_that_is_too_slow_is_told_how_much_it_missed() {
        let events = Server::new().start(Vec::new());
        let (mut slow, mut quick) = (events.listen(), events.listen());
        let count = BEHIND as u64 + 3;
        for n in 0..count {
            let mut random = [0; 32];
            random[..8].copy_from_slice(&n.to_le_bytes());
            let sandbox = SandboxId::from_random(random);
            events.tell(Happening { sandbox, ..at(1, Created) });
            assert!(quick.next().await.unwrap().is_ok());
        }
        assert_eq!(slow.next().await, Some(Err(Missed(3))));
    }

    #[tokio::test]
    async fn nothing_is_told_of_what_never_was_made_and_streams_end_with_the_server() {
        let events = Server::new().start(Vec::new());
        let mut listener = events.listen();
        events.tell(at(1, Stopped));
        events.tell(at(1, Deleted));
        assert_eq!(all(&mut listener), []);
        events.close();
        assert_eq!(listener.next().await, None);
    }

    #[test]
    fn a_journal_survives_half_a_line_and_forgets_what_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("told");
        fs::write(&path, "a created\na started\nb created\nb deleted\nnonsense\nc cre").unwrap();
        let journal = Journal::open(path.clone()).unwrap();
        assert_eq!(journal.told, HashMap::from([("a".to_owned(), Started)]));
        assert_eq!(fs::read_to_string(path).unwrap(), "a started\n");
    }
}
