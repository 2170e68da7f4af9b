//! Shims that wait for their pod: marked as nobody's, in a cgroup that yields to every pod, until a pod
//! claims one and its processes move to the pod's cgroup.

use super::{CGROUP_FILE, HOST_OVERHEAD_MB, ShimProcesses, adjust_oom_score, gone, limits, parent};
use crate::sandbox::{SandboxError, blocking, network::Link, spec::SandboxSpec};
use a3s_box_sys::cgroup::Limits;
use a3s_box_types::{
    SandboxId,
    shim::{BoundaryConfig, CONFIG_FILE, ShimConfig},
};
use std::{fs, io};
use tracing::warn;

/// Lies in the folder of a shim that is no pod's.
const SPARE_FILE: &str = "spare";
/// An eighth of a pod's that asks for none: less, and a busy node never gets a spare ready.
const SPARE_CPU_SHARES: u64 = 128;
/// The kernel's own, for pods that ask for none.
const CPU_SHARES: u64 = 1024;

impl ShimProcesses {
    pub(super) async fn begin_spare(
        &self,
        id: &SandboxId,
        spec: &SandboxSpec,
        link: Link,
    ) -> Result<(), SandboxError> {
        let folder = self.folder(id);
        blocking("mark the spare", move || {
            let marked = fs::create_dir_all(&folder);
            marked
                .and_then(|()| fs::write(folder.join(SPARE_FILE), ""))
                .map_err(|error| SandboxError::step("mark the spare", error))
        })
        .await?;
        let limits = Limits {
            cpu_shares: SPARE_CPU_SHARES,
            memory_max: (u64::from(spec.size.memory_mb) + HOST_OVERHEAD_MB) << 20,
            ..Limits::default()
        };
        self.begin(id, spec, link, limits).await
    }

    pub(super) fn marked_spare(&self, id: &SandboxId) -> bool {
        self.folder(id).join(SPARE_FILE).exists()
    }

    pub(super) async fn claim_spare(
        &self,
        id: &SandboxId,
        spec: &SandboxSpec,
    ) -> Result<bool, SandboxError> {
        const STEP: &str = "claim a waiting guest";
        let failed = |error: io::Error| SandboxError::step(STEP, error);
        let folder = self.folder(id);
        let order = fs::read(folder.join(CONFIG_FILE)).map_err(failed)?;
        let order: ShimConfig = serde_json::from_slice(&order)
            .map_err(|error| SandboxError::step("read the waiting guest's order", error))?;
        let today = self.templates.start_order(spec.size).await?;
        let current = matches!(&order.boundary, BoundaryConfig::Microvm(vm)
            if vm.vm.start == today.start && vm.vm.accel == today.accel && vm.vm.size == spec.size);
        if !current || self.living(id)?.none() {
            return Ok(false);
        }
        gone(fs::remove_file(folder.join(SPARE_FILE)), STEP)?;
        Ok(true)
    }

    pub(super) async fn move_spare(
        &self,
        id: &SandboxId,
        spec: &SandboxSpec,
    ) -> Result<(), SandboxError> {
        const STEP: &str = "move the guest to the pod's cgroup";
        let failed = |error: io::Error| SandboxError::step(STEP, error);
        let file = self.folder(id).join(CGROUP_FILE);
        let from = self.cgroups(id)?.pop();
        let living = self.living(id)?;
        let (to, to_parent) = (self.cgroup_under(id, parent(spec)), parent(spec).to_owned());
        let mut limits = limits(spec);
        if limits.cpu_shares == 0 {
            limits.cpu_shares = CPU_SHARES;
        }
        let score = spec.host_limits.oom_score_adj;
        blocking(STEP, move || {
            let from_parent = fs::read_to_string(&file).map_err(failed)?;
            let moves = from_parent != to_parent;
            if moves {
                // Both, before the second is made: whoever finds one knows of the other.
                fs::write(&file, format!("{to_parent}\n{from_parent}")).map_err(failed)?;
            }
            let (doors, unset) = to.create(&limits).map_err(failed)?;
            if !unset.is_empty() {
                warn!(limits = unset.join("; "), "the pod's host cgroup is not limited as asked");
            }
            for process in &living.listed {
                adjust_oom_score(process.pid, score);
            }
            if let Some(from) = from.filter(|_| moves) {
                to.admit(&doors, &from).map_err(failed)?;
                from.remove().map_err(failed)?;
                fs::write(&file, to_parent).map_err(failed)?;
            }
            Ok(())
        })
        .await
    }
}
