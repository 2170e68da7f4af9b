//! What a new server makes of what the last one left.
//!
//! | found | done |
//! |---|---|
//! | Creating | torn down and forgotten: its caller is gone, kubelet asks again |
//! | Ready, shim answers | kept; the shim's State is the truth about its containers |
//! | Ready, shim dead or the host booted since | torn down, NOTREADY, containers ended |
//! | Ready, could not tell | kept, shown NOTREADY, looked at again |
//! | Stopping | its teardown goes on |
//! | folder or namespace without a readable record, no process | torn down by its id, forgotten |
//! | a spare guest without a record | the same, with its processes |
//! | the same, with a process or in doubt | kept, shown NOTREADY until somebody stops it |

use super::{
    SandboxError, Sandboxes, blocking,
    driver::Beginning,
    index, now,
    record::{Record, SANDBOX},
    spec::{SandboxName, SandboxSpec},
};
use crate::{container::ContainerRecord, status::chain};
use a3s_box_store::Object;
use a3s_box_types::{ContainerId, SandboxId, sandbox::SandboxState, shim::VmSize};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};
use tracing::{info, warn};

/// Longest that the start of the server waits for shims to answer; then they are unclear.
const PATIENCE: Duration = Duration::from_secs(15);
/// Namespace of sandboxes that are shown without a record.
const LOST: &str = "a3s-box-lost";

impl index::Sandboxes {
    /// Takes in everything a former server left. Returns when it is known what runs.
    pub async fn recover(&self) -> Result<(), SandboxError> {
        let store = self.deps().store.clone();
        let objects = blocking("read the records", move || Ok(store.scan()?)).await?;
        let mut known = BTreeSet::new();
        let mut adopted = Vec::new();
        for (folder, object) in objects {
            let Ok(id) = folder.parse::<SandboxId>() else {
                warn!(folder, "not a sandbox's folder; left alone");
                continue;
            };
            known.insert(id.clone());
            match read(self, &id, &object).await? {
                Some((record, containers)) => adopted.push(self.readopt(record, containers)),
                None => self.lost(&id).await,
            }
        }
        for id in self.leftovers().await {
            if !known.contains(&id) {
                self.lost(&id).await;
            }
        }
        for sandbox in &adopted {
            let settled = sandbox.wait_for(|view| view.settled);
            if tokio::time::timeout(PATIENCE, settled).await.is_err() {
                warn!(id = sandbox.view().record.id.short(), "not settled in time");
            }
        }
        let happened = self.all().iter().flat_map(|(_, view)| view.happened()).collect();
        self.deps().events.recovered(happened);
        info!(sandboxes = adopted.len(), "recovered");
        Ok(())
    }

    fn readopt(
        &self,
        record: Record,
        containers: BTreeMap<ContainerId, Arc<ContainerRecord>>,
    ) -> super::Sandbox {
        let mut record = record;
        let beginning = match record.state {
            SandboxState::Creating => Beginning::Forget,
            SandboxState::Stopping => Beginning::Teardown,
            SandboxState::NotReady => Beginning::Idle,
            SandboxState::Ready if record.boot_id != self.deps().boot_id => {
                record.end_reason = Some("the host was booted".to_owned());
                Beginning::Teardown
            }
            SandboxState::Ready => Beginning::Resume,
        };
        self.adopt(record, containers, None, beginning)
    }

    /// Something is left of a sandbox whose record is not there or not readable.
    async fn lost(&self, id: &SandboxId) {
        let spare = self.deps().shims.is_spare(id);
        let doubt = match self.deps().shims.is_alive(id).await {
            Ok(false) => None,
            // No pod was ever in it.
            Ok(true) if spare => None,
            Ok(true) => Some("its record is lost and its shim lives".to_owned()),
            Err(error) => Some(format!("its record is lost; {}", chain(&error))),
        };
        let mut record = placeholder(id, &self.deps().boot_id);
        match doubt {
            Some(why) => {
                warn!(id = id.short(), why, "kept, and shown as not ready");
                self.adopt(record, BTreeMap::new(), Some(why), Beginning::Idle);
            }
            None => {
                info!(id = id.short(), "removing what is left of a sandbox without a record");
                record.state = SandboxState::Creating;
                self.adopt(record, BTreeMap::new(), None, Beginning::Forget);
            }
        }
    }

    /// Sandboxes that something outside the store is left of.
    async fn leftovers(&self) -> BTreeSet<SandboxId> {
        let mut found = BTreeSet::new();
        let (shims, networks) =
            tokio::join!(self.deps().shims.leftovers(), self.deps().network.leftovers());
        for list in [shims, networks] {
            match list {
                Ok(list) => found.extend(list),
                Err(error) => warn!(error = chain(&error), "cannot look for leftovers"),
            }
        }
        found
    }
}

type Found = (Record, BTreeMap<ContainerId, Arc<ContainerRecord>>);

/// The object's records; those of another shape are set aside. `None`: without a sandbox's record.
async fn read(
    all: &Sandboxes,
    id: &SandboxId,
    object: &Object,
) -> Result<Option<Found>, SandboxError> {
    let mut containers = BTreeMap::new();
    let mut bad = Vec::new();
    for name in object.records.keys().filter(|name| ContainerRecord::is_file(name)) {
        match object.get::<ContainerRecord>(name) {
            Some(Ok(record)) if record.sandbox_id == *id => {
                containers.insert(record.id.clone(), Arc::new(record));
            }
            Some(Ok(_)) => bad.push((name.clone(), "another sandbox's".to_owned())),
            Some(Err(error)) => bad.push((name.clone(), error.to_string())),
            None => {}
        }
    }
    let record = match object.get::<Record>(SANDBOX) {
        Some(Ok(record)) if record.id == *id => Some(record),
        Some(Ok(_)) => {
            bad.push((SANDBOX.to_owned(), "another sandbox's".to_owned()));
            None
        }
        Some(Err(error)) => {
            bad.push((SANDBOX.to_owned(), error.to_string()));
            None
        }
        None => None,
    };
    let (store, id) = (all.deps().store.clone(), id.clone());
    blocking("set records aside", move || {
        for (name, why) in bad {
            store.set_aside(id.as_str(), &name, &why)?;
        }
        Ok(())
    })
    .await?;
    Ok(record.map(|record| (record, containers)))
}

/// Stands for a sandbox of which only the id is known. Not saved unless somebody stops it: the next
/// server looks again.
fn placeholder(id: &SandboxId, boot_id: &str) -> Record {
    let name = SandboxName {
        namespace: LOST.to_owned(),
        name: id.short().to_owned(),
        uid: id.to_string(),
        attempt: 0,
    };
    Record {
        id: id.clone(),
        spec: SandboxSpec::plain(name, VmSize { vcpus: 0, memory_mb: 0 }),
        state: SandboxState::Ready,
        created_at: now(),
        boot_id: boot_id.to_owned(),
        network: None,
        boundary: None,
        end_reason: Some("its record was lost".to_owned()),
        resized: None,
    }
}
