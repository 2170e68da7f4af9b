//! The agent's errors, and the one place that turns them into gRPC statuses.

use crate::plan::{Failure, FailureKind};
use a3s_box_types::words::fitting;
use std::{fmt::Display, io};
use tonic::{Code, Status};

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The request makes sense, but this agent cannot do it.
    #[error("{0} is not supported")]
    Unsupported(String),
    /// No such container.
    #[error("no container {0}")]
    NoContainer(String),
    /// The id is taken.
    #[error("container {0} exists already")]
    Exists(String),
    /// Not now.
    #[error("{0}")]
    NotNow(String),
    /// The new process says why.
    #[error(transparent)]
    Child(#[from] Failure),
    /// A step of the agent's own.
    #[error("{step}: {}", crate::child::text(source))]
    Io {
        /// Which step, and on what.
        step: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// The request makes no sense.
    pub fn invalid(text: impl Into<String>) -> Self {
        Self::Invalid(text.into())
    }
}

/// Names the step an error belongs to.
pub trait Step<T> {
    /// `step` says what was done, and to what.
    fn step(self, step: impl Display) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, step: impl Display) -> Result<T, Error> {
        self.map_err(|error| Error::Io { step: step.to_string(), source: error.into() })
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::Invalid(_) => Code::InvalidArgument,
            Error::Unsupported(_) => Code::Unimplemented,
            Error::NoContainer(_) => Code::NotFound,
            Error::Exists(_) => Code::AlreadyExists,
            Error::NotNow(_) => Code::FailedPrecondition,
            Error::Child(failure) => match failure.kind {
                FailureKind::Invalid => Code::InvalidArgument,
                FailureKind::NotFound => Code::NotFound,
                FailureKind::PermissionDenied => Code::PermissionDenied,
                FailureKind::Internal => Code::Internal,
            },
            Error::Io { .. } => Code::Internal,
        };
        Status::new(code, fitting(error.to_string()))
    }
}
