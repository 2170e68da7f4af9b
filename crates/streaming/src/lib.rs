//! Exec, attach and port-forward as kubelet's clients speak them (KEP-4006, cri-streaming).
//!
//! ```text
//! kubelet ── gRPC Exec ──▶ Server::exec_url ──▶ a URL with a token
//!    └───── HTTP upgrade ──▶ Server ──▶ SPDY/3.1 or WebSocket ──▶ Backend
//! ```
//!
//! A URL is good for one request and one minute. The [`Backend`] is whoever runs processes; this crate
//! knows nothing of containers. Bytes are taken from a client only when the backend takes them, and from
//! the backend only when the client does: a session holds a few chunks at most.
//!
//! [`spdy`] is the framing (client-go's flavour of SPDY/3.1); `remote_command`, `port_forward` and
//! `websocket` are what is said in it. Not here: ExecSync, which has no streams.

mod activity;
mod backend;
mod budget;
mod channels;
#[cfg(feature = "fuzz")]
pub mod fuzz;
mod hangup;
mod port_forward;
mod remote_command;
mod server;
pub mod spdy;
mod status;
mod threads;
mod tls;
mod token;
mod tunnel;
mod upgrade;
mod websocket;

pub use backend::{
    AttachRequest, Backend, BackendError, ExecRequest, Input, Output, PortForwardRequest, Streams,
    TerminalSize,
};
pub use server::{Config, Server, Urls};
pub use tls::{Tls, TlsError};
pub use token::TooMany;
