//! The driver's part in a container's life: intent saved, order to the shim beside the driver,
//! result saved.

use super::{
    HappeningKind, NewContainer, Reply, SandboxError, blocking,
    driver::{Driver, answer, tell},
    now,
    resize::Resizing,
    state_name,
};
use crate::{
    container::{ContainerRecord, Exit, Phase, spec::Resources},
    failpoint,
    status::chain,
};
use a3s_box_api::shim::v1 as shim;
use a3s_box_types::{ContainerId, sandbox::SandboxState};
use std::{collections::HashMap, ops::ControlFlow, sync::Arc};
use tokio::task::JoinSet;
use tonic::Code;
use tracing::{Instrument, info, warn};

/// Orders to the shim that are under way, at most one per container, and who waits for them.
#[derive(Default)]
pub(super) struct Jobs {
    tasks: JoinSet<Done>,
    creating: HashMap<ContainerId, Vec<Reply<ContainerId>>>,
    starting: HashMap<ContainerId, Vec<Reply>>,
    removing: HashMap<ContainerId, Vec<Reply>>,
    pub(super) resizing: Option<Resizing>,
}

/// An order that has its answer.
pub(super) enum Done {
    /// CreateContainer; on an error the shim keeps nothing of it, or says so.
    Created(ContainerId, Result<shim::ContainerState, Failed>),
    /// StartContainer.
    Started(ContainerId, Result<shim::ContainerState, SandboxError>),
    /// RemoveContainer.
    Removed(ContainerId, Result<(), SandboxError>),
    /// Resize.
    Resized(Result<(), SandboxError>),
}

/// A failed creation.
pub(super) struct Failed {
    why: SandboxError,
    /// Something may be left of it in the shim.
    left: bool,
}

impl Jobs {
    /// The next answer; `None` while nothing is under way.
    pub(super) async fn next(&mut self) -> Option<Done> {
        loop {
            match self.tasks.join_next().await? {
                Ok(done) => return Some(done),
                Err(error) => warn!(%error, "an order to the shim was lost"),
            }
        }
    }

    fn busy(&self, id: &ContainerId) -> bool {
        self.creating.contains_key(id)
            || self.starting.contains_key(id)
            || self.removing.contains_key(id)
    }

    pub(super) fn run(&mut self, work: impl Future<Output = Done> + Send + 'static) {
        self.tasks.spawn(work.in_current_span());
    }
}

impl Driver {
    pub(super) async fn create_container(
        &mut self,
        new: NewContainer,
        reply: Reply<ContainerId>,
    ) -> ControlFlow<()> {
        match self.admit(&new.record) {
            Err(error) => answer(reply, Err(error)),
            Ok(Some(id)) => match self.jobs.creating.get_mut(&id) {
                Some(waiting) => waiting.push(reply),
                None => answer(reply, Ok(id)),
            },
            Ok(None) => self.begin_container(new, reply).await,
        }
        ControlFlow::Continue(())
    }

    /// Whether it may be made; the id of the one it is when it is being made or was made already.
    fn admit(&self, new: &ContainerRecord) -> Result<Option<ContainerId>, SandboxError> {
        self.needs_ready()?;
        let same_name = |other: &&Arc<ContainerRecord>| {
            other.spec.name == new.spec.name && other.spec.attempt == new.spec.attempt
        };
        let Some(other) = self.containers.values().find(same_name) else { return Ok(None) };
        let fresh = matches!(other.phase, Phase::Creating | Phase::Created);
        if fresh && other.spec == new.spec && other.image_id == new.image_id {
            return Ok(Some(other.id.clone()));
        }
        Err(SandboxError::NameInUse {
            kind: "container",
            name: format!("{} (attempt {})", new.spec.name, new.spec.attempt),
            id: other.id.to_string(),
        })
    }

    pub(super) fn needs_ready(&self) -> Result<(), SandboxError> {
        if self.boundary_exists() && self.unclear.is_none() && self.settled {
            return Ok(());
        }
        Err(SandboxError::State {
            kind: "sandbox",
            id: self.record.id.to_string(),
            state: state_name(self.record.state, self.unclear.as_deref()),
            needed: "ready",
        })
    }

    async fn begin_container(&mut self, new: NewContainer, reply: Reply<ContainerId>) {
        let id = new.record.id.clone();
        if let Err(error) = self.keep(new.record).await {
            return answer(reply, Err(error));
        }
        failpoint::hit("container-intent-saved");
        self.jobs.creating.insert(id.clone(), vec![reply]);
        let shim = self.shim.clone();
        self.jobs.run(async move {
            match shim.create_container(new.order).await {
                Ok(state) => Done::Created(id, Ok(state)),
                Err(why) => {
                    let left = shim.remove_container(id.as_str()).await.is_err();
                    Done::Created(id, Err(Failed { why, left }))
                }
            }
        });
    }

    pub(super) fn start_container(&mut self, id: &ContainerId, reply: Reply) -> ControlFlow<()> {
        if let Some(waiting) = self.jobs.starting.get_mut(id) {
            waiting.push(reply);
            return ControlFlow::Continue(());
        }
        match self.may_start(id) {
            Err(error) => answer(reply, Err(error)),
            Ok(()) => {
                let (shim, id) = (self.shim.clone(), id.clone());
                self.jobs.starting.insert(id.clone(), vec![reply]);
                self.jobs.run(async move {
                    let result = shim.start_container(id.as_str()).await;
                    Done::Started(id, result)
                });
            }
        }
        ControlFlow::Continue(())
    }

    fn may_start(&self, id: &ContainerId) -> Result<(), SandboxError> {
        let Some(container) = self.containers.get(id) else {
            return Err(SandboxError::no_container(id.as_str()));
        };
        self.needs_ready()?;
        if container.phase == Phase::Created && !self.jobs.busy(id) {
            return Ok(());
        }
        Err(SandboxError::State {
            kind: "container",
            id: id.to_string(),
            state: container.state_name(),
            needed: "created",
        })
    }

    pub(super) async fn remove_container(
        &mut self,
        id: &ContainerId,
        reply: Reply,
    ) -> ControlFlow<()> {
        if let Some(waiting) = self.jobs.removing.get_mut(id) {
            waiting.push(reply);
            return ControlFlow::Continue(());
        }
        let Some(container) = self.containers.get(id) else {
            answer(reply, Ok(()));
            return ControlFlow::Continue(());
        };
        let mut removing = ContainerRecord::clone(container);
        let exit = removing.exit().cloned().unwrap_or_else(|| {
            Exit::with_boundary(removing.started_at(), now(), "removed while it ran".to_owned())
        });
        removing.phase = Phase::Removing(exit);
        if let Err(error) = self.keep(removing).await {
            answer(reply, Err(error));
            return ControlFlow::Continue(());
        }
        failpoint::hit("container-removing-saved");
        self.jobs.removing.insert(id.clone(), vec![reply]);
        let (shim, id, boundary) = (self.shim.clone(), id.clone(), self.boundary_exists());
        self.jobs.run(async move {
            let result = if boundary { shim.remove_container(id.as_str()).await } else { Ok(()) };
            Done::Removed(id, result)
        });
        ControlFlow::Continue(())
    }

    pub(super) async fn save_resources(
        &mut self,
        id: &ContainerId,
        resources: Resources,
        reply: Reply,
    ) -> ControlFlow<()> {
        let result = match self.containers.get(id) {
            Some(container) => {
                let mut updated = ContainerRecord::clone(container);
                updated.spec.resources = resources;
                self.keep(updated).await
            }
            None => Err(SandboxError::no_container(id.as_str())),
        };
        answer(reply, result);
        ControlFlow::Continue(())
    }

    fn boundary_exists(&self) -> bool {
        self.record.state == SandboxState::Ready
    }

    pub(super) async fn done(&mut self, done: Done) -> ControlFlow<()> {
        match done {
            Done::Created(id, result) => self.container_created(&id, result).await,
            Done::Started(id, result) => self.container_started(&id, result).await,
            Done::Removed(id, result) => self.container_removed(&id, result).await,
            Done::Resized(result) => self.resized(result).await,
        }
        ControlFlow::Continue(())
    }

    async fn container_created(
        &mut self,
        id: &ContainerId,
        result: Result<shim::ContainerState, Failed>,
    ) {
        failpoint::hit("container-created");
        let result = match result {
            Ok(state) => {
                self.take_over(&state).await;
                info!(container = id.short(), "container created");
                self.happened(Some(id), HappeningKind::Created);
                failpoint::hit("container-created-saved");
                Ok(())
            }
            Err(failed) => {
                self.drop_failed(id, &failed).await;
                Err(Arc::new(failed.why))
            }
        };
        for reply in self.jobs.creating.remove(id).unwrap_or_default() {
            tell(reply, result.clone().map(|()| id.clone()));
        }
    }

    /// A container that never was leaves no name behind, unless something of it may still be there.
    async fn drop_failed(&mut self, id: &ContainerId, failed: &Failed) {
        let ended = self.boundary_exists();
        if failed.left
            && ended
            && let Some(container) = self.containers.get(id)
        {
            let mut kept = ContainerRecord::clone(container);
            kept.phase = Phase::Exited(Exit::start_failed(now(), chain(&failed.why)));
            self.keep_or_log(kept).await;
        } else if let Err(error) = self.forget_container(id).await {
            warn!(error = chain(&error), "the record of a failed container stays");
        }
    }

    async fn container_started(
        &mut self,
        id: &ContainerId,
        result: Result<shim::ContainerState, SandboxError>,
    ) {
        failpoint::hit("container-started");
        match &result {
            Ok(state) => {
                self.take_over(state).await;
                info!(container = id.short(), "container started");
                self.happened(Some(id), HappeningKind::Started);
            }
            Err(error) if refused(error) => self.record_failed_start(id, error).await,
            // Nobody knows whether it runs: the shim's State will say.
            Err(_) => {}
        }
        let result = result.map(drop).map_err(Arc::new);
        for reply in self.jobs.starting.remove(id).unwrap_or_default() {
            tell(reply, result.clone());
        }
    }

    async fn record_failed_start(&mut self, id: &ContainerId, error: &SandboxError) {
        let Some(container) = self.containers.get(id) else { return };
        if matches!(container.phase, Phase::Created | Phase::Running { .. }) {
            let mut failed = ContainerRecord::clone(container);
            failed.phase = Phase::Exited(Exit::start_failed(now(), chain(error)));
            self.keep_or_log(failed).await;
            self.happened(Some(id), HappeningKind::Stopped);
        }
    }

    async fn container_removed(&mut self, id: &ContainerId, result: Result<(), SandboxError>) {
        let started = self.containers.get(id).is_some_and(|container| container.started_at() > 0);
        // A boundary that ended in between took the container with it.
        let result = match result {
            Err(error) if self.boundary_exists() => Err(error),
            _ => self.forget_container(id).await,
        };
        if result.is_ok() {
            info!(container = id.short(), "container removed");
            if started {
                self.happened(Some(id), HappeningKind::Stopped);
            }
            self.happened(Some(id), HappeningKind::Deleted);
        }
        let result = result.map_err(Arc::new);
        for reply in self.jobs.removing.remove(id).unwrap_or_default() {
            tell(reply, result.clone());
        }
    }

    /// Takes over what the shim says of one container.
    pub(super) async fn take_over(&mut self, state: &shim::ContainerState) {
        let Ok(id) = state.container_id.parse::<ContainerId>() else { return };
        let Some(container) = self.containers.get(&id) else { return };
        let had_ended = container.exit().is_some();
        let mut told = ContainerRecord::clone(container);
        if !told.take_over(state) {
            return;
        }
        let (exit, started) = (told.exit().cloned(), told.started_at() > 0);
        self.keep_or_log(told).await;
        if let (false, Some(exit)) = (had_ended, exit) {
            info!(
                container = id.short(),
                code = exit.code,
                reason = exit.reason,
                "container exited"
            );
            // A command may be over before its start is answered.
            if started {
                self.happened(Some(&id), HappeningKind::Started);
            }
            self.happened(Some(&id), HappeningKind::Stopped);
        }
    }

    /// After a new connection: every container's truth, and what became of those that the last server
    /// was working on.
    pub(super) async fn reconcile(&mut self, state: &shim::StateResponse) {
        for container in &state.containers {
            let Ok(id) = container.container_id.parse::<ContainerId>() else { continue };
            match self.containers.get(&id).map(|known| &known.phase) {
                // Its order is under way, and the answer to that is what makes it one.
                Some(Phase::Creating) if self.jobs.creating.contains_key(&id) => {}
                Some(Phase::Creating) => self.undo_creation(&id).await,
                _ => self.take_over(container).await,
            }
        }
        if !self.settled {
            self.missing(state).await;
        }
    }

    /// Containers with a record that the shim does not know.
    async fn missing(&mut self, state: &shim::StateResponse) {
        let known = |id: &ContainerId| {
            state.containers.iter().any(|container| container.container_id == id.as_str())
        };
        let missing: Vec<_> = self
            .containers
            .values()
            .filter(|container| container.exit().is_none() && !known(&container.id))
            .cloned()
            .collect();
        for container in missing {
            if container.phase == Phase::Creating {
                self.undo_creation(&container.id).await;
            } else {
                let mut lost = ContainerRecord::clone(&container);
                lost.phase = Phase::Exited(Exit::unknown(container.started_at(), now()));
                self.keep_or_log(lost).await;
            }
        }
    }

    /// The server died while it made this container, and its caller heard nothing.
    async fn undo_creation(&mut self, id: &ContainerId) {
        let undone = match self.shim.remove_container(id.as_str()).await {
            Ok(()) => self.forget_container(id).await,
            Err(error) => Err(error),
        };
        if let Err(error) = undone {
            warn!(container = id.short(), error = chain(&error), "a half-made container stays");
        }
    }

    /// The boundary is gone, and with it every container.
    pub(super) async fn end_containers(&mut self, why: &str) -> Result<(), SandboxError> {
        let mut errors = Vec::new();
        for container in self.containers.values().cloned().collect::<Vec<_>>() {
            let mut ended = ContainerRecord::clone(&container);
            if ended.end_with_boundary(now(), why) {
                errors.extend(self.keep(ended).await.err());
                self.happened(Some(&container.id), HappeningKind::Stopped);
            }
        }
        SandboxError::gather(errors)
    }

    /// Saves the record, then shows it.
    async fn keep(&mut self, container: ContainerRecord) -> Result<(), SandboxError> {
        let container = Arc::new(container);
        let (store, record) = (self.deps.store.clone(), container.clone());
        blocking("save the container's record", move || record.save(&store)).await?;
        self.containers.insert(container.id.clone(), container);
        self.publish();
        Ok(())
    }

    /// For what the shim keeps as well: a record that cannot be saved now is told again later.
    async fn keep_or_log(&mut self, container: ContainerRecord) {
        let id = container.id.clone();
        if let Err(error) = self.keep(container).await {
            warn!(container = id.short(), error = chain(&error), "record not saved");
        }
    }

    async fn forget_container(&mut self, id: &ContainerId) -> Result<(), SandboxError> {
        let (store, object) = (self.deps.store.clone(), self.record.id.clone());
        let file = ContainerRecord::file(id);
        let gone = move || Ok(store.remove_record(object.as_str(), &file)?);
        blocking("remove the container's record", gone).await?;
        self.containers.remove(id);
        self.publish();
        Ok(())
    }
}

/// Whether the shim or the agent said no, rather than nothing.
fn refused(error: &SandboxError) -> bool {
    match error {
        SandboxError::Shim { status, .. } => !matches!(
            status.code(),
            Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown
        ),
        _ => false,
    }
}
