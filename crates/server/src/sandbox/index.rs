//! Every sandbox of the node, by id and by name.
//!
//! A name belongs to one sandbox from RunPodSandbox to RemovePodSandbox. The same request again joins
//! it, so a retry after kubelet's deadline gets the id of what the first one made.

use super::{
    Deps, Sandbox, SandboxError, View,
    create::Origin,
    driver::{self, Beginning},
    now,
    record::Record,
    spec::{SandboxName, SandboxSpec},
};
use crate::container::ContainerRecord;
use a3s_box_types::{ContainerId, SandboxId, sandbox::SandboxState};
use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// All sandboxes. Cheap to clone.
#[derive(Clone)]
pub struct Sandboxes {
    pub(super) deps: Deps,
    index: Arc<Mutex<Index>>,
}

#[derive(Default)]
struct Index {
    by_id: BTreeMap<SandboxId, Sandbox>,
    by_name: HashMap<SandboxName, SandboxId>,
}

impl Sandboxes {
    /// None yet; `recover` finds those of former servers.
    pub fn new(deps: Deps) -> Self {
        Self { deps, index: Arc::default() }
    }

    /// What drivers work with.
    pub fn deps(&self) -> &Deps {
        &self.deps
    }

    /// Begins the sandbox, or joins the one that the same request began. Returns at once.
    pub fn run(&self, spec: SandboxSpec) -> Result<Sandbox, SandboxError> {
        let mut index = self.lock();
        if let Some(sandbox) = index.named(&spec.name) {
            let view = sandbox.view();
            let joinable =
                matches!(view.record.state, SandboxState::Creating | SandboxState::Ready)
                    && view.unclear.is_none();
            if joinable && view.record.spec == spec {
                return Ok(sandbox.clone());
            }
            return Err(SandboxError::NameInUse {
                kind: "sandbox",
                name: spec.name.to_string(),
                id: view.record.id.to_string(),
            });
        }
        let (id, origin) = match self.deps.spares.take(&spec) {
            Some(id) => (id, Origin::Spare),
            None => (SandboxId::from_random(rand::random()), Origin::New),
        };
        let record = Record {
            id,
            spec,
            state: SandboxState::Creating,
            created_at: now(),
            boot_id: self.deps.boot_id.clone(),
            network: None,
            boundary: None,
            end_reason: None,
            resized: None,
        };
        Ok(self.insert(&mut index, record, BTreeMap::new(), None, Beginning::Create(origin)))
    }

    /// Takes a sandbox of a former server in.
    pub(super) fn adopt(
        &self,
        record: Record,
        containers: BTreeMap<ContainerId, Arc<ContainerRecord>>,
        unclear: Option<String>,
        beginning: Beginning,
    ) -> Sandbox {
        self.insert(&mut self.lock(), record, containers, unclear, beginning)
    }

    fn insert(
        &self,
        index: &mut Index,
        record: Record,
        containers: BTreeMap<ContainerId, Arc<ContainerRecord>>,
        unclear: Option<String>,
        beginning: Beginning,
    ) -> Sandbox {
        let (id, name) = (record.id.clone(), record.spec.name.clone());
        let all = Arc::downgrade(&self.index);
        let ended = move |id: &SandboxId| {
            if let Some(all) = all.upgrade() {
                all.lock().unwrap_or_else(PoisonError::into_inner).forget(id);
            }
        };
        let sandbox = driver::start(record, containers, unclear, beginning, &self.deps, ended);
        index.by_name.insert(name, id.clone());
        index.by_id.insert(id, sandbox.clone());
        sandbox
    }

    /// The sandbox with this id, or with the only one that begins so.
    pub fn get(&self, id: &str) -> Result<Sandbox, SandboxError> {
        let index = self.lock();
        let found = index.by_id.values().filter(|sandbox| {
            let view = sandbox.view();
            view.record.id.as_str().starts_with(id) && !view.removed
        });
        only("sandbox", id, found.cloned())
    }

    /// The container with this id, or with the only one that begins so, and its sandbox.
    pub fn container(&self, id: &str) -> Result<(Sandbox, Arc<ContainerRecord>), SandboxError> {
        let found = self.all().into_iter().flat_map(|(sandbox, view)| {
            let of_sandbox = view.containers.values().filter(|c| c.id.as_str().starts_with(id));
            of_sandbox.map(|c| (sandbox.clone(), c.clone())).collect::<Vec<_>>()
        });
        only("container", id, found)
    }

    /// All that are not removed, with their views, by id.
    pub fn all(&self) -> Vec<(Sandbox, Arc<View>)> {
        let sandboxes: Vec<_> = self.lock().by_id.values().cloned().collect();
        sandboxes
            .into_iter()
            .map(|sandbox| {
                let view = sandbox.view();
                (sandbox, view)
            })
            .filter(|(_, view)| !view.removed)
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, Index> {
        // A panic while it was held left plain data, whole at every statement.
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Index {
    fn named(&self, name: &SandboxName) -> Option<&Sandbox> {
        let sandbox = self.by_id.get(self.by_name.get(name)?)?;
        (!sandbox.view().removed).then_some(sandbox)
    }

    fn forget(&mut self, id: &SandboxId) {
        self.by_id.remove(id);
        self.by_name.retain(|_, named| named != id);
    }
}

/// The only one; an empty id is nobody's.
fn only<T>(
    kind: &'static str,
    id: &str,
    found: impl Iterator<Item = T>,
) -> Result<T, SandboxError> {
    let mut found = found.filter(|_| !id.is_empty());
    match (found.next(), found.next()) {
        (Some(one), None) => Ok(one),
        (None, _) => Err(SandboxError::NotFound { kind, id: id.to_owned() }),
        (Some(_), Some(_)) => Err(SandboxError::Ambiguous { kind, id: id.to_owned() }),
    }
}
