//! The one teardown: after a failed creation, for Stop and Remove, after the boundary's own end, and
//! at recovery. Finds everything by the id, may be repeated, and goes on past errors.

use super::{HappeningKind, SandboxError, create, driver::Driver};
use a3s_box_types::sandbox::{Event, SandboxState};
use std::time::Duration;

/// How long the last look at the containers may take before they are killed anyway.
const LAST_LOOK: Duration = Duration::from_secs(2);

impl Driver {
    /// Ends the boundary and undoes every outside effect. Containers that had not ended have then.
    ///
    /// What fails leaves the sandbox Stopping, to be tried again at the next Stop.
    pub(super) async fn teardown(&mut self, event: Event) -> Result<(), SandboxError> {
        let mut errors = Vec::new();
        self.record.state = self.record.state.on(event)?;
        if self.record.state == SandboxState::NotReady {
            return Ok(());
        }
        errors.extend(create::save(&self.record, &self.deps).await.err());
        crate::failpoint::hit("sandbox-stopping-saved");
        self.unwatch();
        self.publish();
        self.last_look().await;
        let (id, spec) = (&self.record.id, &self.record.spec);
        let (ended, detached) =
            tokio::join!(self.deps.shims.end(id), self.deps.network.teardown(id, spec));
        errors.extend(ended.err());
        errors.extend(detached.err());
        let why = self.record.end_reason.clone().unwrap_or_else(|| "sandbox stopped".to_owned());
        errors.extend(self.end_containers(&why).await.err());
        self.stuck = !errors.is_empty();
        if errors.is_empty() {
            self.record.state = self.record.state.on(Event::TornDown)?;
            self.unclear = None;
            errors.extend(create::save(&self.record, &self.deps).await.err());
        }
        self.happened(None, HappeningKind::Stopped);
        self.publish();
        SandboxError::gather(errors)
    }

    /// Takes over exits that nobody told yet, from the shim or from what it wrote.
    async fn last_look(&mut self) {
        if self.containers.values().all(|container| container.exit().is_some()) {
            return;
        }
        let asked = tokio::time::timeout(LAST_LOOK, self.shim.state()).await;
        let states = match asked {
            Ok(Ok(state)) => state.containers,
            _ => self.deps.shims.last_words(&self.record.id).await,
        };
        for state in states {
            self.take_over(&state).await;
        }
    }
}
