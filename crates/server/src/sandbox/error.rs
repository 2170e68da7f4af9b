//! What can go wrong with a sandbox or a container.

use crate::status::{Failure, chain};
use a3s_box_store::StoreError;
use std::{sync::Arc, time::Duration};
use tonic::Code;

/// An error whose kind only matters to the person who reads it.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// A request of the CRI that cannot be done. `status.rs` turns each kind into its gRPC code.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A field has a value that means nothing.
    #[error("{field}: {why}")]
    Invalid {
        /// As the CRI names it.
        field: String,
        /// What is wrong with it.
        why: String,
    },
    /// A field asks for something this server does not do.
    #[error("{field} is not supported: {why}")]
    Unsupported {
        /// As the CRI names it.
        field: String,
        /// Why not.
        why: String,
    },
    /// There is no such sandbox, container or image.
    #[error("{kind} {id:?} not found")]
    NotFound {
        /// sandbox, container or image.
        kind: &'static str,
        /// As the caller wrote it.
        id: String,
    },
    /// A shortened id fits several.
    #[error("{kind} id {id:?} is not unique")]
    Ambiguous {
        /// sandbox or container.
        kind: &'static str,
        /// As the caller wrote it.
        id: String,
    },
    /// The name belongs to something else.
    #[error("{kind} name {name} is in use by {id} with another config or in another state")]
    NameInUse {
        /// sandbox or container.
        kind: &'static str,
        /// As the caller wrote it.
        name: String,
        /// Who has it.
        id: String,
    },
    /// Not in this state.
    #[error("{kind} {id} is {state}, not {needed}")]
    State {
        /// sandbox or container.
        kind: &'static str,
        /// Which one.
        id: String,
        /// Where it stands.
        state: &'static str,
        /// Where it would have to stand.
        needed: &'static str,
    },
    /// Too much of something waits already.
    #[error("{0}")]
    Busy(String),
    /// Stop or Remove came while it was being made.
    #[error("{kind} {id} was stopped while it was being created")]
    Stopped {
        /// sandbox or container.
        kind: &'static str,
        /// Which one.
        id: String,
    },
    /// A step did not end in time.
    #[error("{step}: no answer within {within:?}")]
    Timeout {
        /// What was waited for.
        step: &'static str,
        /// How long.
        within: Duration,
    },
    /// A step failed.
    #[error("{step}")]
    Step {
        /// What was done.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: Cause,
    },
    /// The shim or the agent refused or could not.
    #[error("{step}: {}", status.message())]
    Shim {
        /// What was asked of it.
        step: &'static str,
        /// Its answer; the code is passed on.
        status: Box<tonic::Status>,
    },
    /// The record could not be kept.
    #[error("record")]
    Store(#[from] StoreError),
    /// An event that the sandbox's state does not allow: a fault of this program.
    #[error(transparent)]
    Rule(#[from] a3s_box_types::sandbox::Refused),
    /// Several steps of a teardown failed; the rest were done.
    #[error("{}", list(.0))]
    Several(Vec<SandboxError>),
    /// The same failure, told to everybody who waited for it.
    #[error(transparent)]
    Shared(#[from] Arc<SandboxError>),
    /// The server is going down.
    #[error("the server is shutting down")]
    Shutdown,
}

impl SandboxError {
    /// Too much of something waits already.
    pub fn busy(why: String) -> Self {
        Self::Busy(why)
    }

    /// A field has a value that means nothing.
    pub fn invalid(field: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), why: why.into() }
    }

    /// A field that cannot be honoured.
    pub fn unsupported(field: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Unsupported { field: field.into(), why: why.into() }
    }

    /// A failed step.
    pub fn step(step: &'static str, source: impl Into<Cause>) -> Self {
        Self::Step { step, source: source.into() }
    }

    /// No such container.
    pub fn no_container(id: &str) -> Self {
        Self::NotFound { kind: "container", id: id.to_owned() }
    }

    /// No such sandbox.
    pub fn no_sandbox(id: &str) -> Self {
        Self::NotFound { kind: "sandbox", id: id.to_owned() }
    }

    /// Nothing, the one error, or all of them.
    pub fn gather(errors: Vec<Self>) -> Result<(), Self> {
        let mut errors = errors;
        match errors.len() {
            0 => Ok(()),
            1 => Err(errors.remove(0)),
            _ => Err(Self::Several(errors)),
        }
    }
}

impl Failure for SandboxError {
    fn code(&self) -> Code {
        match self {
            Self::Invalid { .. } | Self::Ambiguous { .. } => Code::InvalidArgument,
            Self::Unsupported { .. } => Code::Unimplemented,
            Self::NotFound { .. } => Code::NotFound,
            Self::NameInUse { .. } => Code::AlreadyExists,
            Self::Busy(_) => Code::ResourceExhausted,
            Self::State { .. } => Code::FailedPrecondition,
            Self::Stopped { .. } => Code::Aborted,
            Self::Timeout { .. } => Code::DeadlineExceeded,
            Self::Shutdown => Code::Unavailable,
            Self::Shim { status, .. } => match status.code() {
                // To a CRI client NotFound means the container; here it was the command.
                Code::NotFound | Code::PermissionDenied => Code::InvalidArgument,
                code => code,
            },
            Self::Step { .. } | Self::Store(_) | Self::Rule(_) | Self::Several(_) => Code::Internal,
            Self::Shared(error) => error.code(),
        }
    }
}

fn list(errors: &[SandboxError]) -> String {
    errors.iter().map(|error| chain(error)).collect::<Vec<_>>().join("; ")
}
