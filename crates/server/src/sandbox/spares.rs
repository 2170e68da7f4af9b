//! Spare guests: started, and rehearsed, before a pod asks for them.
//!
//! A spare has the id that its sandbox will have, so every name outside is right from the beginning. Its
//! network namespace is without CNI, its cgroup yields to every pod's, and its folder is marked: a server
//! that finds it without a record ends it. RunPodSandbox of the same size takes one; another one is then
//! made, of the sizes that were asked for last, once the node has a quiet moment: a pod that starts has
//! better use for the processors. What is not taken ends with the server.

use super::{
    SandboxError, blocking,
    network::{Link, Network},
    rehearsal::Rehearsal,
    shims::Shims,
    spec::{Boundary, SandboxName, SandboxSpec},
};
use crate::status::chain;
use a3s_box_store::Store;
use a3s_box_types::{SandboxId, shim::VmSize};
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use tokio::{sync::Notify, task::AbortHandle};
use tracing::{info, warn};

/// Until another one is tried after one could not be made.
const RETRY: Duration = Duration::from_secs(60);
/// So long no pod or container has to have been started before one is made.
const QUIET: Duration = Duration::from_secs(1);
/// A node that is never quiet waits no longer than this.
const LONGEST: Duration = Duration::from_secs(10);

/// The node's spare guests. Cheap to clone.
#[derive(Clone)]
pub struct Spares(Option<Arc<Inner>>);

struct Inner {
    outside: Outside,
    pool: Mutex<Pool>,
    wake: Notify,
    starts: Mutex<Starts>,
    /// Held while a namespace is made, which goes on though its task is aborted.
    preparing: Arc<tokio::sync::Mutex<()>>,
}

/// What makes a moment no quiet one.
#[derive(Default)]
struct Starts {
    now: usize,
    last: Option<Instant>,
}

/// While it is held, and a little longer, no spare is begun.
pub struct Starting(Arc<Inner>);

impl Drop for Starting {
    fn drop(&mut self) {
        let mut starts = self.0.starts();
        starts.now -= 1;
        starts.last = Some(Instant::now());
    }
}

/// What spares are made with.
pub struct Outside {
    /// Where their disks lie, as all sandboxes'.
    pub store: Store,
    /// For namespace and tap.
    pub network: Arc<dyn Network>,
    /// For the guest itself.
    pub shims: Arc<dyn Shims>,
    /// What each goes through before it is ready.
    pub rehearsal: Rehearsal,
}

#[derive(Default)]
struct Pool {
    /// One entry for each spare there should be, the size asked for last at the end.
    wanted: VecDeque<VmSize>,
    ready: Vec<Spare>,
    /// The one that is being made or ended.
    under_way: Option<Spare>,
    task: Option<AbortHandle>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Spare {
    id: SandboxId,
    size: VmSize,
}

impl Spares {
    /// Never any.
    pub fn none() -> Self {
        Self(None)
    }

    /// `count` of them, at first of the size `default`. None is made before [`Spares::fill`].
    pub fn new(count: usize, default: VmSize, outside: Outside) -> Self {
        if count == 0 {
            return Self::none();
        }
        let pool = Pool { wanted: vec![default; count].into(), ..Pool::default() };
        let pool = Mutex::new(pool);
        let (wake, starts, preparing) = (Notify::new(), Mutex::default(), Arc::default());
        Self(Some(Arc::new(Inner { outside, pool, wake, starts, preparing })))
    }

    /// Begins to make them, one at a time. Call inside a runtime.
    pub fn fill(&self) {
        let Some(inner) = self.0.clone() else { return };
        let mut pool = inner.lock();
        if pool.task.is_none() {
            pool.task = Some(tokio::spawn(inner.clone().run()).abort_handle());
        }
    }

    /// One for this sandbox, which has its id from now on.
    pub fn take(&self, spec: &SandboxSpec) -> Option<SandboxId> {
        let inner = self.0.as_ref().filter(|_| spec.boundary() == Boundary::Microvm)?;
        let taken = inner.lock().take(spec.size);
        inner.wake.notify_one();
        taken
    }

    /// A pod or container is being started, and no spare shall be in its way.
    pub fn yield_to_start(&self) -> Option<Starting> {
        let inner = self.0.clone()?;
        inner.starts().now += 1;
        Some(Starting(inner))
    }

    /// How many are ready.
    pub fn waiting(&self) -> usize {
        self.0.as_ref().map_or(0, |inner| inner.lock().ready.len())
    }

    /// Ends all, and makes no more.
    pub async fn end(&self) {
        let Some(inner) = &self.0 else { return };
        let left: Vec<Spare> = {
            let mut pool = inner.lock();
            pool.wanted.clear();
            if let Some(task) = pool.task.take() {
                task.abort();
            }
            let under_way = pool.under_way.take();
            pool.ready.drain(..).chain(under_way).collect()
        };
        // Else the namespace of the one under way would be there after its teardown.
        drop(inner.preparing.lock().await);
        futures::future::join_all(left.iter().map(|spare| inner.discard(spare))).await;
    }
}

impl Pool {
    fn take(&mut self, size: VmSize) -> Option<SandboxId> {
        if self.wanted.pop_front().is_some() {
            self.wanted.push_back(size);
        }
        let at = self.ready.iter().position(|spare| spare.size == size)?;
        Some(self.ready.remove(at).id)
    }

    /// What is to be done next: end one that nobody wants any more, or make one.
    fn next(&mut self) -> Option<Work> {
        let mut missing: Vec<VmSize> = self.wanted.iter().copied().collect();
        let mut unwanted = None;
        for (at, spare) in self.ready.iter().enumerate() {
            match missing.iter().position(|size| *size == spare.size) {
                Some(found) => drop(missing.remove(found)),
                None => unwanted = Some(at),
            }
        }
        if let Some(at) = unwanted {
            let spare = self.ready.remove(at);
            self.under_way = Some(spare.clone());
            return Some(Work::End(spare));
        }
        let spare = Spare { id: SandboxId::from_random(rand::random()), size: missing.pop()? };
        self.under_way = Some(spare.clone());
        Some(Work::Make(spare))
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Work {
    Make(Spare),
    End(Spare),
}

impl Inner {
    async fn run(self: Arc<Self>) {
        loop {
            let work = self.lock().next();
            match work {
                None => self.wake.notified().await,
                Some(Work::End(spare)) => {
                    self.discard(&spare).await;
                    self.lock().under_way = None;
                }
                Some(Work::Make(spare)) => {
                    self.quiet().await;
                    self.make(spare).await;
                }
            }
        }
    }

    /// Returns in a quiet moment, or when there is none for too long.
    async fn quiet(&self) {
        let until = Instant::now() + LONGEST;
        loop {
            let now = Instant::now();
            let calm = match *self.starts() {
                Starts { now: 1.., .. } => now + QUIET,
                Starts { last: Some(last), .. } => last + QUIET,
                Starts { last: None, .. } => now,
            };
            match calm.min(until).saturating_duration_since(now) {
                Duration::ZERO => return,
                wait => tokio::time::sleep(wait).await,
            }
        }
    }

    async fn make(&self, spare: Spare) {
        let since = Instant::now();
        let made = self.start(&spare).await;
        if let Err(error) = &made {
            warn!(size = ?spare.size, "no spare guest: {}", chain(error));
            // Then the next one is booted.
            self.outside.shims.clone_failed(&spare.id, &spare.spec()).await;
            self.discard(&spare).await;
        }
        {
            let mut pool = self.lock();
            pool.under_way = None;
            if made.is_ok() {
                let ms = since.elapsed().as_millis();
                info!(id = spare.id.short(), size = ?spare.size, ms, "spare guest ready");
                return pool.ready.push(spare);
            }
        }
        tokio::time::sleep(RETRY).await;
    }

    async fn start(&self, spare: &Spare) -> Result<(), SandboxError> {
        let (id, spec) = (&spare.id, spare.spec());
        let link = self.prepare(id, &spec).await?;
        self.outside.shims.start_spare(id, &spec, link).await?;
        self.outside.rehearsal.run(id, &spec, &self.outside.shims.client(id)).await
    }

    /// Runs to its end though nobody waits for it any more; [`Spares::end`] does.
    async fn prepare(&self, id: &SandboxId, spec: &SandboxSpec) -> Result<Link, SandboxError> {
        let held = self.preparing.clone().lock_owned().await;
        let (network, id, spec) = (self.outside.network.clone(), id.clone(), spec.clone());
        let prepared = tokio::spawn(async move {
            let _held = held;
            network.prepare(&id, &spec).await
        });
        prepared.await.map_err(|error| SandboxError::step("make a spare's namespace", error))?
    }

    /// Leaves nothing of one; what stays is for the next server to find.
    async fn discard(&self, spare: &Spare) {
        let (id, spec) = (&spare.id, spare.spec());
        let end = async {
            self.outside.shims.end(id).await?;
            self.outside.network.teardown(id, &spec).await?;
            self.outside.shims.forget(id).await?;
            let (store, id) = (self.outside.store.clone(), id.clone());
            blocking("remove a spare's folder", move || Ok(store.remove(id.as_str())?)).await
        };
        if let Err(error) = end.await {
            warn!(id = id.short(), "a spare guest is not removed: {}", chain(&error));
        }
    }

    fn starts(&self) -> MutexGuard<'_, Starts> {
        self.starts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, Pool> {
        // A panic while it was held left plain data, whole at every statement.
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Spare {
    fn spec(&self) -> SandboxSpec {
        let name = SandboxName {
            namespace: "a3s-box-spare".to_owned(),
            name: "spare".to_owned(),
            uid: self.id.to_string(),
            attempt: 0,
        };
        SandboxSpec::plain(name, self.size)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::{
        super::{fakes::FakeHost, record::NetworkStatus},
        *,
    };
    use a3s_box_types::network::GuestNetwork;
    use std::{path::Path, sync::mpsc};

    fn size(memory_mb: u32) -> VmSize {
        VmSize { vcpus: 1, memory_mb }
    }

    fn make(pool: &mut Pool) -> VmSize {
        let Some(Work::Make(spare)) = pool.next() else { panic!("one is to be made") };
        let size = spare.size;
        pool.ready.push(spare);
        size
    }

    #[test]
    fn spares_follow_the_sizes_that_were_asked_for_last() {
        let mut pool = Pool { wanted: vec![size(512); 2].into(), ..Pool::default() };
        assert_eq!((make(&mut pool), make(&mut pool)), (size(512), size(512)));
        assert_eq!(pool.next(), None);

        let first = pool.ready[0].id.clone();
        assert_eq!(pool.take(size(512)), Some(first));
        assert_eq!(make(&mut pool), size(512));

        // Another size: there is none yet, and the next time there is.
        assert_eq!(pool.take(size(1024)), None);
        assert!(matches!(pool.next(), Some(Work::End(spare)) if spare.size == size(512)));
        assert_eq!(make(&mut pool), size(1024));
        assert_eq!(pool.next(), None);
        assert!(pool.take(size(1024)).is_some());
        assert!(pool.take(size(512)).is_some());
    }

    /// Namespaces that are made in a thread, as the kernel's are, and only when they may be.
    struct Slow {
        host: Arc<FakeHost>,
        told: tokio::sync::mpsc::UnboundedSender<&'static str>,
        go: Mutex<Option<mpsc::Receiver<()>>>,
    }

    #[tonic::async_trait]
    impl Network for Slow {
        async fn prepare(&self, id: &SandboxId, _: &SandboxSpec) -> Result<Link, SandboxError> {
            let (host, id, go) = (self.host.clone(), id.clone(), self.go.lock().unwrap().take());
            let told = self.told.clone();
            told.send("begun").unwrap();
            blocking("make a namespace", move || {
                go.unwrap().recv().unwrap();
                host.add_netns(&id);
                told.send("made").unwrap();
                Ok(Link::Node)
            })
            .await
        }

        async fn attach(
            &self,
            _: &SandboxId,
            _: &SandboxSpec,
        ) -> Result<NetworkStatus, SandboxError> {
            unreachable!("a spare is in no network");
        }

        async fn join(
            &self,
            _: &SandboxId,
            _: &SandboxSpec,
            _: &NetworkStatus,
        ) -> Result<GuestNetwork, SandboxError> {
            unreachable!("a spare is in no network");
        }

        async fn teardown(&self, id: &SandboxId, spec: &SandboxSpec) -> Result<(), SandboxError> {
            self.host.teardown(id, spec).await
        }

        async fn leftovers(&self) -> Result<Vec<SandboxId>, SandboxError> {
            Network::leftovers(&*self.host).await
        }
    }

    #[tokio::test]
    async fn an_end_waits_for_the_namespace_that_is_being_made() {
        let host = FakeHost::new();
        let (told, mut happened) = tokio::sync::mpsc::unbounded_channel();
        let (let_go, go) = mpsc::channel();
        let network = Arc::new(Slow { host: host.clone(), told, go: Mutex::new(Some(go)) });
        let outside = Outside {
            store: Store::open(host.folder.path().join("sandboxes")).unwrap(),
            network,
            shims: host.clone(),
            rehearsal: Rehearsal::new(Path::new("/no/agent"), host.folder.path()),
        };
        let spares = Spares::new(1, size(512), outside);
        spares.fill();
        assert_eq!(happened.recv().await, Some("begun"));
        let end = tokio::spawn(async move { spares.end().await });
        // All that it does before it waits.
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        assert!(!end.is_finished());
        let_go.send(()).unwrap();
        end.await.unwrap();
        assert_eq!(happened.recv().await, Some("made"));
        assert_eq!(host.census(), (0, 0, 0, 0));
    }
}
