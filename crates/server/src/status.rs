//! Errors to gRPC: the only place that chooses codes and the words a CRI client reads.
//!
//! Every error that an RPC may end with implements [`Failure`]. The matches name every variant, so
//! a new one has to be given its code here.

use a3s_box_types::words::fitting;
use tonic::{Code, Status};

/// An error an RPC may end with.
pub trait Failure: std::error::Error {
    /// The code CRI clients act on.
    fn code(&self) -> Code;
}

/// The answer for a failed RPC: the code, and the error with its whole chain of causes, as far as it fits.
pub fn status(error: &impl Failure) -> Status {
    Status::new(error.code(), fitting(chain(error)))
}

/// An error with its causes, on one line; a cause that its parent already quotes is not repeated.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let words = cause.to_string();
        if !text.ends_with(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        next = cause.source();
    }
    text
}

/// A failure of an RPC that is about the node, not about one sandbox, container or image.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The CRI has this RPC and this server does not.
    #[error("{0} is not implemented by a3s-box-cri")]
    NotThere(&'static str),
    /// A field has a value that means nothing.
    #[error("{field}: {why}")]
    Invalid {
        /// As the CRI names it.
        field: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// A field asks for something this server does not do.
    #[error("{field} is not supported: {why}")]
    Unsupported {
        /// As the CRI names it.
        field: &'static str,
        /// Why not.
        why: String,
    },
}

impl Failure for NodeError {
    fn code(&self) -> Code {
        match self {
            Self::NotThere(_) | Self::Unsupported { .. } => Code::Unimplemented,
            Self::Invalid { .. } => Code::InvalidArgument,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_holds_the_whole_chain_of_causes() {
        #[derive(Debug, thiserror::Error)]
        #[error("pull {image}")]
        struct Pull {
            image: &'static str,
            source: std::io::Error,
        }
        impl Failure for Pull {
            fn code(&self) -> Code {
                Code::Unknown
            }
        }
        let error = Pull { image: "x", source: std::io::Error::other("no route") };
        let answer = status(&error);
        assert_eq!((answer.code(), answer.message()), (Code::Unknown, "pull x: no route"));
    }

    #[test]
    fn an_rpc_that_is_not_there_answers_unimplemented_and_its_name() {
        let answer = status(&NodeError::NotThere("Exec"));
        assert_eq!(answer.code(), Code::Unimplemented);
        assert!(answer.message().starts_with("Exec "));
    }
}
