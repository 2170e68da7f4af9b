//! The driver: one task per sandbox, the only writer of its records.

use super::{
    Deps, Happening, HappeningKind, Reply, Request, Sandbox, SandboxError, View, blocking,
    containers::Jobs,
    create::{self, Origin},
    now,
    record::Record,
    watch::{self, Note},
};
use crate::{container::ContainerRecord, shim_client::ShimClient, status::chain};
use a3s_box_types::{
    ContainerId, SandboxId,
    sandbox::{Event, SandboxState},
};
use std::{collections::BTreeMap, ops::ControlFlow, sync::Arc};
use tokio::{
    sync::{mpsc, watch as watch_channel},
    task::{AbortHandle, JoinSet},
};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, debug, info, info_span, warn};

/// Requests that wait for a driver in the middle of a teardown.
const QUEUE: usize = 64;

/// How a driver begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Beginning {
    /// A new sandbox.
    Create(Origin),
    /// A sandbox that a former server left ready: find out what became of it.
    Resume,
    /// A sandbox that a former server left in the middle of its creation: end and forget it.
    Forget,
    /// A sandbox that a former server left in the middle of its end: go on with that.
    Teardown,
    /// Nothing is to be done until somebody asks.
    Idle,
}

/// The single owner of one sandbox.
pub(super) struct Driver {
    pub(super) record: Record,
    pub(super) containers: BTreeMap<ContainerId, Arc<ContainerRecord>>,
    pub(super) unclear: Option<String>,
    pub(super) deps: Deps,
    pub(super) shim: ShimClient,
    pub(super) jobs: Jobs,
    created: Option<Result<(), Arc<SandboxError>>>,
    pub(super) settled: bool,
    pub(super) stuck: bool,
    removed: bool,
    requests: mpsc::Receiver<Request>,
    view: watch_channel::Sender<Arc<View>>,
    notes: (mpsc::Sender<Note>, mpsc::Receiver<Note>),
    tasks: JoinSet<()>,
    watcher: Option<AbortHandle>,
    creation: Option<Creation>,
}

/// A creation under way.
struct Creation {
    stop: CancellationToken,
    end: tokio::task::JoinHandle<(Record, Result<(), SandboxError>)>,
    /// Stops and removals that wait for it.
    waiting: Vec<Request>,
}

/// Starts the driver of a sandbox; `ended` runs when it is over.
pub(crate) fn start(
    record: Record,
    containers: BTreeMap<ContainerId, Arc<ContainerRecord>>,
    unclear: Option<String>,
    beginning: Beginning,
    deps: &Deps,
    ended: impl FnOnce(&SandboxId) + Send + 'static,
) -> Sandbox {
    let (requests, queue) = mpsc::channel(QUEUE);
    let shim = deps.shims.client(&record.id);
    let created = (!matches!(beginning, Beginning::Create(_))).then_some(Ok(()));
    let settled = !matches!(beginning, Beginning::Resume);
    let first = View {
        record: record.clone(),
        containers: containers.clone(),
        unclear: unclear.clone(),
        created: created.clone(),
        settled,
        stuck: false,
        removed: false,
    };
    let (view, reader) = watch_channel::channel(Arc::new(first));
    let driver = Driver {
        record,
        containers,
        unclear,
        deps: deps.clone(),
        shim: shim.clone(),
        jobs: Jobs::default(),
        created,
        settled,
        stuck: false,
        removed: false,
        requests: queue,
        view,
        notes: mpsc::channel(QUEUE),
        tasks: JoinSet::new(),
        watcher: None,
        creation: None,
    };
    let span = info_span!(parent: None, "sandbox", id = driver.record.id.short());
    let work = async move {
        let id = driver.record.id.clone();
        driver.run(beginning).await;
        ended(&id);
    };
    tokio::spawn(work.instrument(span));
    Sandbox { requests, view: reader, shim }
}

impl Driver {
    async fn run(mut self, beginning: Beginning) {
        match beginning {
            Beginning::Create(origin) => self.begin_creation(origin),
            Beginning::Resume => self.watch(),
            Beginning::Forget => {
                if self.remove().await.is_ok() {
                    return;
                }
            }
            Beginning::Teardown => self.log_teardown(Event::StopRequested).await,
            Beginning::Idle => {}
        }
        loop {
            let step = tokio::select! {
                request = self.requests.recv() => match request {
                    Some(request) => self.handle(request).await,
                    None => ControlFlow::Break(()),
                },
                Some(note) = self.notes.1.recv() => self.note(note).await,
                Some(done) = self.jobs.next() => self.done(done).await,
                end = creation_end(&mut self.creation) => self.creation_ended(end).await,
            };
            if step.is_break() {
                return;
            }
        }
    }

    async fn handle(&mut self, request: Request) -> ControlFlow<()> {
        if let (Some(creation), Request::Stop(_) | Request::Remove(_)) =
            (&mut self.creation, &request)
        {
            creation.stop.cancel();
            creation.waiting.push(request);
            return ControlFlow::Continue(());
        }
        match request {
            Request::Stop(reply) => {
                let result = self.teardown(Event::StopRequested).await;
                answer(reply, result);
                ControlFlow::Continue(())
            }
            Request::Remove(reply) => {
                let result = self.remove().await;
                let step =
                    if result.is_ok() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
                answer(reply, result);
                step
            }
            Request::CreateContainer(new, reply) => self.create_container(*new, reply).await,
            Request::StartContainer(id, reply) => self.start_container(&id, reply),
            Request::RemoveContainer(id, reply) => self.remove_container(&id, reply).await,
            Request::Resize(to, reply) => self.resize(*to, reply).await,
            Request::SaveResources(id, resources, reply) => {
                self.save_resources(&id, *resources, reply).await
            }
        }
    }

    fn begin_creation(&mut self, origin: Origin) {
        let stop = CancellationToken::new();
        let work = create::create(self.record.clone(), origin, self.deps.clone(), stop.clone());
        let end = tokio::spawn(work.in_current_span());
        self.creation = Some(Creation { stop, end, waiting: Vec::new() });
    }

    async fn creation_ended(
        &mut self,
        end: Result<(Record, Result<(), SandboxError>), tokio::task::JoinError>,
    ) -> ControlFlow<()> {
        let waiting = self.creation.take().map(|creation| creation.waiting).unwrap_or_default();
        let result = match end {
            Ok((record, result)) => {
                self.record = record;
                result
            }
            Err(panic) => Err(SandboxError::step("create the sandbox", panic)),
        };
        let stages = self.record.boundary.as_ref().map(|boundary| boundary.stages_ms.clone());
        self.deps.instruments.started(&result, &stages.unwrap_or_default());
        let step = match result {
            Ok(()) => {
                self.created = Some(Ok(()));
                self.publish();
                let spec = &self.record.spec;
                info!(name = %spec.name, boundary = %spec.boundary(), "sandbox is ready");
                self.happened(None, HappeningKind::Created);
                self.happened(None, HappeningKind::Started);
                self.watch();
                ControlFlow::Continue(())
            }
            Err(error) => self.creation_failed(error).await,
        };
        self.answer_waiting(waiting, step).await
    }

    /// Leaves nothing of a sandbox that never was ready; if that does not work it stays, NOTREADY.
    async fn creation_failed(&mut self, error: SandboxError) -> ControlFlow<()> {
        let error = Arc::new(error);
        self.record.end_reason = Some(chain(&*error));
        let torn_down = self.forget().await;
        self.created = Some(Err(error));
        self.publish();
        match torn_down {
            Ok(()) => ControlFlow::Break(()),
            Err(error) => {
                warn!(error = chain(&error), "teardown after a failed creation is not complete");
                ControlFlow::Continue(())
            }
        }
    }

    async fn answer_waiting(
        &mut self,
        waiting: Vec<Request>,
        step: ControlFlow<()>,
    ) -> ControlFlow<()> {
        let mut step = step;
        for request in waiting {
            match (step, request) {
                (ControlFlow::Break(()), Request::Stop(reply) | Request::Remove(reply)) => {
                    answer(reply, Ok(()));
                }
                (ControlFlow::Break(()), _) => {}
                (ControlFlow::Continue(()), request) => step = self.handle(request).await,
            }
        }
        step
    }

    async fn remove(&mut self) -> Result<(), SandboxError> {
        self.forget().await?;
        self.publish();
        for id in self.containers.keys() {
            self.happened(Some(id), HappeningKind::Deleted);
        }
        self.happened(None, HappeningKind::Deleted);
        Ok(())
    }

    /// Tears down and removes folders and records, the record last. The caller publishes.
    async fn forget(&mut self) -> Result<(), SandboxError> {
        self.teardown(Event::StopRequested).await?;
        self.deps.shims.forget(&self.record.id).await?;
        let (store, id) = (self.deps.store.clone(), self.record.id.clone());
        let gone = move || Ok(store.remove(id.as_str())?);
        blocking("remove the sandbox's records", gone).await?;
        crate::failpoint::hit("sandbox-removed");
        self.removed = true;
        Ok(())
    }

    async fn note(&mut self, note: Note) -> ControlFlow<()> {
        match note {
            Note::State(state) => {
                self.unclear = None;
                self.reconcile(&state).await;
                if !self.settled {
                    self.resume_resize(&state);
                }
                self.settled = true;
                self.publish();
            }
            Note::Exited(state) => self.take_over(&state).await,
            Note::Unclear(why) => {
                if self.unclear.is_none() {
                    warn!(why, "the shim does not answer; kept, and shown as not ready");
                }
                self.unclear = Some(why);
                self.settled = true;
                self.publish();
            }
            Note::Ended(why) => {
                if self.record.state == SandboxState::Ready {
                    warn!(why, "the boundary ended by itself");
                    self.deps.instruments.boundary_died(self.record.spec.boundary());
                    self.record.end_reason = Some(why);
                    self.log_teardown(Event::BoundaryExited).await;
                }
                self.settled = true;
                self.publish();
            }
        }
        ControlFlow::Continue(())
    }

    /// For a teardown that nobody asked for: the next Stop tries again.
    async fn log_teardown(&mut self, event: Event) {
        if let Err(error) = self.teardown(event).await {
            warn!(error = chain(&error), "teardown is not complete");
        }
    }

    fn watch(&mut self) {
        let work = watch::watch(self.record.id.clone(), self.deps.clone(), self.notes.0.clone());
        self.watcher = Some(self.tasks.spawn(work.in_current_span()));
    }

    pub(super) fn unwatch(&mut self) {
        if let Some(watcher) = self.watcher.take() {
            watcher.abort();
        }
        while self.notes.1.try_recv().is_ok() {}
    }

    /// Shows the saved state to everybody.
    pub(super) fn publish(&self) {
        self.view.send_replace(Arc::new(View {
            record: self.record.clone(),
            containers: self.containers.clone(),
            unclear: self.unclear.clone(),
            created: self.created.clone(),
            settled: self.settled,
            stuck: self.stuck,
            removed: self.removed,
        }));
    }

    /// Tells what has just happened to a container, or to the sandbox, at the time that the records have
    /// for it.
    pub(super) fn happened(&self, container: Option<&ContainerId>, kind: HappeningKind) {
        let record = container.and_then(|id| self.containers.get(id));
        let at = match (kind, record) {
            (HappeningKind::Created, Some(record)) => record.created_at,
            (HappeningKind::Started, Some(record)) => record.started_at(),
            (HappeningKind::Stopped, Some(record)) => record.exit().map_or(0, |e| e.finished_at),
            (HappeningKind::Deleted, _) | (_, None) => 0,
        };
        self.deps.events.tell(Happening {
            sandbox: self.record.id.clone(),
            container: container.cloned(),
            kind,
            at: if at > 0 { at } else { now() },
        });
    }
}

/// Pending for ever while there is no creation.
async fn creation_end(
    creation: &mut Option<Creation>,
) -> Result<(Record, Result<(), SandboxError>), tokio::task::JoinError> {
    match creation {
        Some(creation) => (&mut creation.end).await,
        None => std::future::pending().await,
    }
}

/// Answers; a caller that went away is fine.
pub(super) fn answer<T>(reply: Reply<T>, result: Result<T, SandboxError>) {
    tell(reply, result.map_err(Arc::new));
}

/// Answers one of several who wait for the same thing.
pub(super) fn tell<T>(reply: Reply<T>, result: Result<T, Arc<SandboxError>>) {
    if reply.send(result).is_err() {
        debug!("the caller did not wait for the answer");
    }
}
