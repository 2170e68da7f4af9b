//! One sandbox, from RunPodSandbox to RemovePodSandbox.
//!
//! Each sandbox has a single *driver* task. Nothing else changes its record or its containers'
//! records, starts its shim or calls CNI for it. RPC handlers hold a [`Sandbox`], which queues
//! requests to the driver and reads the last saved view; they never wait on a lock.
//!
//! ```text
//! Creating --booted--> Ready --stop/exit--> Stopping --torn down--> NotReady
//!     \________________stop/exit/failed________^
//! ```
//!
//! The record is saved before each outside effect, so a crash at any `.await` leaves either nothing
//! or something that `teardown` can find from the id alone. What takes long (the creation, orders to
//! the guest) runs beside the driver and reports back to it, so a stop is never kept waiting, and a
//! caller that goes away stops nothing.
//!
//! Not here: CRI types (see `sandbox_run.rs`), booting (the shim), IP choice (CNI).

pub mod cni_network;
pub(crate) mod configure;
mod containers;
mod create;
mod driver;
pub mod error;
pub mod events;
pub mod index;
pub mod network;
pub mod record;
mod recovery;
pub mod rehearsal;
pub mod resize;
pub mod shim_process;
pub mod shims;
pub mod spares;
pub mod spec;
mod teardown;
mod watch;

#[cfg(test)]
pub(crate) mod fakes;
#[cfg(test)]
pub(crate) mod tests;

pub use error::SandboxError;
pub use events::{Events, Happening, HappeningKind};
pub use index::Sandboxes;

use crate::{
    container::{ContainerRecord, Phase, spec::Resources},
    instruments::Instruments,
    shim_client::ShimClient,
};
use a3s_box_api::shim::v1 as shim;
use a3s_box_store::Store;
use a3s_box_types::{ContainerId, SandboxId, sandbox::SandboxState};
use record::Record;
use resize::Resized;
use spares::Spares;
use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::sync::{mpsc, oneshot, watch as watch_channel};

/// What a driver works with. Cheap to clone.
#[derive(Clone)]
pub struct Deps {
    /// Where records live.
    pub store: Store,
    /// Namespaces, CNI, taps.
    pub network: Arc<dyn network::Network>,
    /// Shims and their boundaries.
    pub shims: Arc<dyn shims::Shims>,
    /// Guests that wait for their pods.
    pub spares: Spares,
    /// This boot of the host.
    pub boot_id: String,
    /// What the server counts of itself.
    pub instruments: Arc<Instruments>,
    /// What happened, for GetContainerEvents.
    pub events: Arc<Events>,
}

/// The answer to a request; errors are shared by all who wait.
pub type Reply<T = ()> = oneshot::Sender<Result<T, Arc<SandboxError>>>;

/// What handlers ask of a driver.
pub(crate) enum Request {
    /// End the boundary and undo all outside effects.
    Stop(Reply),
    /// Stop, and forget the sandbox and its containers.
    Remove(Reply),
    /// Make a container.
    CreateContainer(Box<NewContainer>, Reply<ContainerId>),
    /// Start one.
    StartContainer(ContainerId, Reply),
    /// Kill and forget one.
    RemoveContainer(ContainerId, Reply),
    /// Give it another size.
    Resize(Box<Resized>, Reply),
    /// Save limits that are in force.
    SaveResources(ContainerId, Box<Resources>, Reply),
}

/// A container to be made.
pub(crate) struct NewContainer {
    /// Its record, in phase Creating.
    pub record: ContainerRecord,
    /// What the shim is told.
    pub order: shim::CreateContainerRequest,
}

/// The last saved state of a sandbox and its containers.
#[derive(Debug, Clone)]
pub struct View {
    /// The sandbox.
    pub record: Record,
    /// All its containers, also those under creation.
    pub containers: BTreeMap<ContainerId, Arc<ContainerRecord>>,
    /// Why nobody can say whether it runs; shown as NOTREADY, kept until it is stopped.
    pub unclear: Option<String>,
    /// How its creation ended; `None` while it goes on.
    pub created: Option<Result<(), Arc<SandboxError>>>,
    /// What a restarted server had to find out is found out.
    pub settled: bool,
    /// The last teardown could not take everything away; the next Stop tries again.
    pub stuck: bool,
    /// Forgotten: the handle is the last thing left of it.
    pub removed: bool,
}

impl View {
    /// What CRI calls READY.
    pub fn ready(&self) -> bool {
        self.record.state == SandboxState::Ready && self.unclear.is_none()
    }

    /// Whether lists show it: not before it was ready once, not after it was removed.
    pub fn listed(&self) -> bool {
        !self.removed && self.record.state != SandboxState::Creating
    }

    /// All that has happened to the sandbox and its containers, as its records have it.
    pub fn happened(&self) -> Vec<Happening> {
        use HappeningKind::{Created, Started, Stopped};
        let of = |container: Option<&ContainerRecord>, kind, at| Happening {
            sandbox: self.record.id.clone(),
            container: container.map(|container| container.id.clone()),
            kind,
            at,
        };
        if self.record.state == SandboxState::Creating {
            return Vec::new();
        }
        let created_at = self.record.created_at;
        let mut all = vec![of(None, Created, created_at), of(None, Started, created_at)];
        for container in self.containers.values().filter(|one| one.phase != Phase::Creating) {
            all.push(of(Some(container), Created, container.created_at));
            if container.started_at() > 0 {
                all.push(of(Some(container), Started, container.started_at()));
            }
            if let Some(exit) = container.exit() {
                all.push(of(Some(container), Stopped, exit.finished_at));
            }
        }
        if self.record.state != SandboxState::Ready {
            all.push(of(None, Stopped, now()));
        }
        all
    }

    /// For error messages.
    pub fn state_name(&self) -> &'static str {
        state_name(self.record.state, self.unclear.as_deref())
    }
}

fn state_name(state: SandboxState, unclear: Option<&str>) -> &'static str {
    match (state, unclear) {
        (_, Some(_)) => "in an unclear state",
        (SandboxState::Creating, None) => "being created",
        (SandboxState::Ready, None) => "ready",
        (SandboxState::Stopping, None) => "stopping",
        (SandboxState::NotReady, None) => "not ready",
    }
}

/// The handle of one sandbox.
#[derive(Clone)]
pub struct Sandbox {
    requests: mpsc::Sender<Request>,
    view: watch_channel::Receiver<Arc<View>>,
    shim: ShimClient,
}

impl Sandbox {
    /// The last saved state.
    pub fn view(&self) -> Arc<View> {
        self.view.borrow().clone()
    }

    /// The shim, for calls that change no record.
    pub fn shim(&self) -> &ShimClient {
        &self.shim
    }

    /// Waits for the end of the creation. Giving up waiting does not end it.
    pub async fn created(&self) -> Result<SandboxId, Arc<SandboxError>> {
        let view = self.wait_for(|view| view.created.is_some()).await?;
        match &view.created {
            Some(Err(error)) => Err(error.clone()),
            _ => Ok(view.record.id.clone()),
        }
    }

    /// Waits until the view is as wanted; fails when the driver ended before.
    pub async fn wait_for(
        &self,
        wanted: impl Fn(&View) -> bool,
    ) -> Result<Arc<View>, Arc<SandboxError>> {
        let mut view = self.view.clone();
        match view.wait_for(|view| wanted(view)).await {
            Ok(view) => Ok(view.clone()),
            Err(_) => Err(Arc::new(SandboxError::Shutdown)),
        }
    }

    /// Ends the boundary. OK when it has ended before.
    pub async fn stop(&self) -> Result<(), Arc<SandboxError>> {
        self.ask(Request::Stop).await.unwrap_or_else(|| self.gone())
    }

    /// Ends and forgets it. OK when it is forgotten already.
    pub async fn remove(&self) -> Result<(), Arc<SandboxError>> {
        self.ask(Request::Remove).await.unwrap_or_else(|| self.gone())
    }

    /// Makes a container, or joins the making of the same one.
    pub(crate) async fn create_container(
        &self,
        new: NewContainer,
    ) -> Result<ContainerId, Arc<SandboxError>> {
        let new = Box::new(new);
        let id = self.view().record.id.clone();
        let answer = self.ask(|reply| Request::CreateContainer(new, reply)).await;
        answer.unwrap_or_else(|| Err(Arc::new(SandboxError::no_sandbox(id.as_str()))))
    }

    /// Starts a created container.
    pub async fn start_container(&self, id: &ContainerId) -> Result<(), Arc<SandboxError>> {
        let answer = self.ask(|reply| Request::StartContainer(id.clone(), reply)).await;
        answer.unwrap_or_else(|| Err(Arc::new(SandboxError::no_container(id.as_str()))))
    }

    /// Kills and forgets a container. OK when it is forgotten already.
    pub async fn remove_container(&self, id: &ContainerId) -> Result<(), Arc<SandboxError>> {
        let answer = self.ask(|reply| Request::RemoveContainer(id.clone(), reply)).await;
        answer.unwrap_or_else(|| self.gone())
    }

    /// Gives it another size.
    pub async fn resize(&self, to: Resized) -> Result<(), Arc<SandboxError>> {
        let to = Box::new(to);
        let id = self.view().record.id.clone();
        let answer = self.ask(|reply| Request::Resize(to, reply)).await;
        answer.unwrap_or_else(|| Err(Arc::new(SandboxError::no_sandbox(id.as_str()))))
    }

    /// Saves limits that the shim has put in force.
    pub async fn save_resources(
        &self,
        id: &ContainerId,
        resources: Resources,
    ) -> Result<(), Arc<SandboxError>> {
        let resources = Box::new(resources);
        let answer = self.ask(|reply| Request::SaveResources(id.clone(), resources, reply)).await;
        answer.unwrap_or_else(|| Err(Arc::new(SandboxError::no_container(id.as_str()))))
    }

    /// The driver's answer; `None` when it has ended.
    async fn ask<T>(
        &self,
        request: impl FnOnce(Reply<T>) -> Request,
    ) -> Option<Result<T, Arc<SandboxError>>> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(request(reply)).await.ok()?;
        answer.await.ok()
    }

    /// The driver has ended: fine after a removal.
    fn gone(&self) -> Result<(), Arc<SandboxError>> {
        if self.view().removed { Ok(()) } else { Err(Arc::new(SandboxError::Shutdown)) }
    }
}

/// Unix nanoseconds.
pub fn now() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| i64::try_from(since.as_nanos()).unwrap_or(i64::MAX))
}

/// Runs what blocks (files, processes, namespaces) beside the runtime.
pub(crate) async fn blocking<T: Send + 'static>(
    step: &'static str,
    work: impl FnOnce() -> Result<T, SandboxError> + Send + 'static,
) -> Result<T, SandboxError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(SandboxError::step(step, error)),
    }
}

/// Milliseconds, for the stages of verbose status.
pub(crate) fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
