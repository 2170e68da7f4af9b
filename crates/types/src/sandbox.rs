//! The life of a sandbox: which event is allowed when, and what follows.
//!
//! ```text
//! Creating --booted--> Ready --stop/exit--> Stopping --torn down--> NotReady
//!     \________________stop/exit____________^
//! ```

use serde::{Deserialize, Serialize};
use std::fmt;

/// Where a sandbox stands. CRI shows `Ready` as READY and everything else as NOTREADY.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SandboxState {
    /// RunPodSandbox is under way; listed by nobody.
    Creating,
    /// The boundary runs and answers.
    Ready,
    /// Being torn down; what could not be torn down yet is tried again at the next Stop.
    Stopping,
    /// Nothing of it is left but its record.
    NotReady,
}

/// What happens to a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The agent answered ConfigureSandbox.
    Booted,
    /// Stop or Remove was asked for, or the creation failed.
    StopRequested,
    /// The boundary ended by itself.
    BoundaryExited,
    /// Every outside effect is undone.
    TornDown,
}

/// An event that this state does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused {
    /// The state it came in.
    pub state: SandboxState,
    /// The event.
    pub event: Event,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a sandbox in state {:?} does not take {:?}", self.state, self.event)
    }
}

impl std::error::Error for Refused {}

impl SandboxState {
    /// The state after `event`: the only place that knows the rules.
    pub fn on(self, event: Event) -> Result<Self, Refused> {
        use Event::{Booted, BoundaryExited, StopRequested, TornDown};
        use SandboxState::{Creating, NotReady, Ready, Stopping};
        match (self, event) {
            (Creating, Booted) => Ok(Ready),
            (Creating | Ready | Stopping, StopRequested | BoundaryExited) => Ok(Stopping),
            (NotReady, StopRequested | BoundaryExited) => Ok(NotReady),
            (Stopping | NotReady, TornDown) => Ok(NotReady),
            (Ready | Stopping | NotReady, Booted) | (Creating | Ready, TornDown) => {
                Err(Refused { state: self, event })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Event::*, SandboxState::*, *};

    #[test]
    fn a_stop_is_never_undone() {
        for state in [Stopping, NotReady] {
            assert!(state.on(Booted).is_err());
        }
        assert_eq!(Creating.on(StopRequested), Ok(Stopping));
    }

    #[test]
    fn nothing_is_torn_down_before_a_stop() {
        for state in [Creating, Ready] {
            assert_eq!(state.on(TornDown), Err(Refused { state, event: TornDown }));
        }
    }

    #[test]
    fn a_stop_may_be_repeated_in_any_state() {
        for state in [Creating, Ready, Stopping, NotReady] {
            for event in [StopRequested, BoundaryExited] {
                let once = state.on(event).unwrap();
                assert_eq!(once.on(event), Ok(once));
            }
        }
    }
}
