//! The container's record: what a restarted server knows of it.

use super::spec::ContainerSpec;
use crate::sandbox::SandboxError;
use a3s_box_api::{agent::v1::ExitCause, shim::v1 as shim};
use a3s_box_store::Store;
use a3s_box_types::{ContainerId, SandboxId};
use serde::{Deserialize, Serialize};

/// Start failed: what a shell would say for a command it cannot run, and containerd says too.
const EXIT_START_FAILED: i32 = 128;
/// Ended with the boundary, by nobody's exit: 128 + SIGKILL.
const EXIT_KILLED: i32 = 137;
/// Nobody can say: containerd's number for it.
const EXIT_UNKNOWN: i32 = 255;

/// One container as saved. Written by its sandbox's driver only.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ContainerRecord {
    /// Names it for ever.
    pub id: ContainerId,
    /// Where it runs.
    pub sandbox_id: SandboxId,
    /// What was asked for.
    pub spec: ContainerSpec,
    /// A name of the image: its first tag, else its digest, else as the caller wrote it.
    pub image_name: String,
    /// Image id: the digest of its config.
    pub image_id: String,
    /// Repository digest, or the id for an image without one.
    pub image_ref: String,
    /// Absolute path of the log file; empty: none.
    pub log_path: String,
    /// Number of the signal that asks it to end.
    pub stop_signal: u32,
    /// Unix nanoseconds.
    pub created_at: i64,
    /// Where it stands.
    pub phase: Phase,
    /// Who it runs as, once the agent has looked it up.
    pub user: Option<User>,
    /// The init process in the guest.
    pub guest_pid: u32,
    /// The OCI spec as sent to the shim, for verbose status.
    pub oci_spec: serde_json::Value,
}

/// Who the container runs as.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Further groups.
    pub groups: Vec<u32>,
}

/// Where a container stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// CreateContainer is under way; listed by nobody.
    Creating,
    /// Made and not started.
    Created,
    /// Started.
    Running {
        /// Unix nanoseconds.
        started_at: i64,
    },
    /// Ended.
    Exited(Exit),
    /// RemoveContainer was asked for; still shows how it ended.
    Removing(Exit),
}

/// How a container ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Unix nanoseconds; 0: never started.
    pub started_at: i64,
    /// Unix nanoseconds.
    pub finished_at: i64,
    /// 0 to 255; 128 + signal.
    pub code: i32,
    /// `Completed`, `Error`, `OOMKilled`, `StartError`, `Unknown`.
    pub reason: String,
    /// For people.
    pub message: String,
}

impl Exit {
    /// The start was refused.
    pub fn start_failed(now: i64, message: String) -> Self {
        Self {
            started_at: 0,
            finished_at: now,
            code: EXIT_START_FAILED,
            reason: "StartError".to_owned(),
            message,
        }
    }

    /// The boundary ended with the container in it.
    pub fn with_boundary(started_at: i64, now: i64, message: String) -> Self {
        Self {
            started_at,
            finished_at: now,
            code: EXIT_KILLED,
            reason: "Error".to_owned(),
            message,
        }
    }

    /// It ran, and nobody can say how it ended.
    pub fn unknown(started_at: i64, now: i64) -> Self {
        Self {
            started_at,
            finished_at: now,
            code: EXIT_UNKNOWN,
            reason: "Unknown".to_owned(),
            message: "the shim does not know this container any more".to_owned(),
        }
    }

    fn from_shim(state: &shim::ContainerState, started_at: i64, memory_limit: i64) -> Self {
        let exit = state.exit.unwrap_or_default();
        let reason = match (exit.oom_killed, exit.code) {
            (true, _) => "OOMKilled",
            (false, 0) => "Completed",
            (false, _) => "Error",
        };
        let message = match exit.cause() {
            ExitCause::Process => String::new(),
            ExitCause::ContainerLimit => {
                format!("killed at the container's memory limit of {memory_limit} bytes")
            }
            ExitCause::PodLimit => {
                "killed at the pod's memory limit, which its containers share".to_owned()
            }
            ExitCause::KernelMemory => {
                "killed below the container's memory limit: the kernel that \
                it runs on had no memory left"
                    .to_owned()
            }
            ExitCause::Boundary | ExitCause::BoundaryMemory => state.end_reason.clone(),
        };
        Self {
            started_at: if state.started_at > 0 { state.started_at } else { started_at },
            finished_at: exit.exited_at,
            code: exit.code,
            reason: reason.to_owned(),
            message,
        }
    }
}

impl ContainerRecord {
    /// Name of the record in the sandbox's folder.
    pub fn file(id: &ContainerId) -> String {
        format!("container-{id}")
    }

    /// Whether a record's name is a container's.
    pub fn is_file(name: &str) -> bool {
        name.starts_with("container-")
    }

    /// Saves it; on return a crash does not take it back.
    pub fn save(&self, store: &Store) -> Result<(), SandboxError> {
        Ok(store.put(self.sandbox_id.as_str(), &Self::file(&self.id), self)?)
    }

    /// For error messages.
    pub fn state_name(&self) -> &'static str {
        match self.phase {
            Phase::Creating => "being created",
            Phase::Created => "created",
            Phase::Running { .. } => "running",
            Phase::Exited(_) => "exited",
            Phase::Removing(_) => "being removed",
        }
    }

    /// Whether it was started and has not ended.
    pub fn is_running(&self) -> bool {
        matches!(self.phase, Phase::Running { .. })
    }

    /// Unix nanoseconds; 0: never started.
    pub fn started_at(&self) -> i64 {
        match &self.phase {
            Phase::Creating | Phase::Created => 0,
            Phase::Running { started_at } => *started_at,
            Phase::Exited(exit) | Phase::Removing(exit) => exit.started_at,
        }
    }

    /// How it ended, when it did.
    pub fn exit(&self) -> Option<&Exit> {
        match &self.phase {
            Phase::Creating | Phase::Created | Phase::Running { .. } => None,
            Phase::Exited(exit) | Phase::Removing(exit) => Some(exit),
        }
    }

    /// Takes over what the shim knows; whether that changed anything. An end is never undone.
    pub fn take_over(&mut self, state: &shim::ContainerState) -> bool {
        use shim::container_state::Phase as Told;
        let before = (self.phase.clone(), self.user.clone(), self.guest_pid);
        self.user = Some(User { uid: state.uid, gid: state.gid, groups: state.groups.clone() });
        self.guest_pid = state.guest_pid;
        let started_at = state.started_at;
        self.phase = match (before.0.clone(), state.phase()) {
            (Phase::Creating, Told::Created) => Phase::Created,
            (Phase::Creating | Phase::Created, Told::Running) => Phase::Running { started_at },
            (Phase::Creating | Phase::Created | Phase::Running { .. }, Told::Exited) => {
                let limit = self.spec.resources.memory_limit;
                Phase::Exited(Exit::from_shim(state, self.started_at(), limit))
            }
            (kept, _) => kept,
        };
        before != (self.phase.clone(), self.user.clone(), self.guest_pid)
    }

    /// The boundary is gone: whatever had not ended has now. Whether that changed anything.
    pub fn end_with_boundary(&mut self, now: i64, why: &str) -> bool {
        match &self.phase {
            Phase::Exited(_) | Phase::Removing(_) => false,
            Phase::Creating | Phase::Created | Phase::Running { .. } => {
                let exit = Exit::with_boundary(self.started_at(), now, why.to_owned());
                self.phase = Phase::Exited(exit);
                true
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use a3s_box_api::agent::v1 as agent;
    use shim::container_state::Phase as Told;

    pub(crate) fn record(phase: Phase) -> ContainerRecord {
        ContainerRecord {
            id: ContainerId::from_random([1; 32]),
            sandbox_id: SandboxId::from_random([2; 32]),
            spec: ContainerSpec::default(),
            image_name: String::new(),
            image_id: String::new(),
            image_ref: String::new(),
            log_path: String::new(),
            stop_signal: 15,
            created_at: 1,
            phase,
            user: None,
            guest_pid: 0,
            oci_spec: serde_json::Value::Null,
        }
    }

    fn told(phase: Told, code: i32, oom_killed: bool) -> shim::ContainerState {
        shim::ContainerState {
            phase: phase.into(),
            started_at: 5,
            exit: Some(agent::Exit { code, exited_at: 9, oom_killed, ..Default::default() }),
            ..Default::default()
        }
    }

    #[test]
    fn an_exit_gets_the_reason_that_kubelet_knows() {
        for (code, oom, reason) in [
            (0, false, "Completed"),
            (3, false, "Error"),
            (137, true, "OOMKilled"),
            (0, true, "OOMKilled"),
        ] {
            let mut container = record(Phase::Running { started_at: 5 });
            assert!(container.take_over(&told(Told::Exited, code, oom)));
            let exit = container.exit().unwrap();
            assert_eq!((exit.reason.as_str(), exit.code), (reason, code));
            assert_eq!((exit.started_at, exit.finished_at), (5, 9));
        }
    }

    #[test]
    fn what_killed_a_container_for_memory_is_told_apart() {
        for (cause, reason, word) in [
            (ExitCause::ContainerLimit, "OOMKilled", "container's memory limit of 4096 bytes"),
            (ExitCause::PodLimit, "OOMKilled", "the pod's memory limit"),
            (ExitCause::KernelMemory, "OOMKilled", "had no memory left"),
            (ExitCause::BoundaryMemory, "OOMKilled", "QEMU is gone"),
            (ExitCause::Boundary, "Error", "QEMU is gone"),
        ] {
            let mut container = record(Phase::Running { started_at: 5 });
            container.spec.resources.memory_limit = 4096;
            let mut told = told(Told::Exited, 137, reason == "OOMKilled");
            told.end_reason = "QEMU is gone".to_owned();
            told.exit.as_mut().unwrap().set_cause(cause);
            container.take_over(&told);
            let exit = container.exit().unwrap();
            assert_eq!(exit.reason, reason, "{cause:?}");
            assert!(exit.message.contains(word), "{cause:?}: {}", exit.message);
        }
    }

    #[test]
    fn an_end_is_never_undone() {
        let end = Phase::Exited(Exit::start_failed(7, "no".into()));
        for told_phase in [Told::Created, Told::Running, Told::Exited] {
            let mut container = record(end.clone());
            container.take_over(&told(told_phase, 0, false));
            assert_eq!(container.phase, end);
        }
    }

    #[test]
    fn the_end_of_the_boundary_is_no_success() {
        let mut container = record(Phase::Running { started_at: 5 });
        assert!(container.end_with_boundary(9, "QEMU died"));
        let exit = container.exit().unwrap().clone();
        assert_eq!((exit.code, exit.reason.as_str(), exit.started_at), (137, "Error", 5));
        assert!(!container.end_with_boundary(10, "again"));
        assert_eq!(container.exit(), Some(&exit));
    }
}
