//! SPDY/3.1 as client-go speaks it (github.com/moby/spdystream; draft-mbelshe-httpbis-spdy-00 with the
//! per-session flow control of 3.1, which that client neither does nor expects).
//!
//! `frame` turns bytes into frames and back, `headers` the compressed header blocks, [`Session`] carries
//! many streams on one connection. Clients of this kind send without asking for a window and never grant
//! one, so what holds them back is the connection: it is not read while a stream's taker is busy.

mod frame;
mod headers;
mod session;

pub use frame::{Frame, FrameError, LARGEST_CONTROL, Reader, flag};
pub use headers::{Compressor, Decompressor, HeaderError, Headers};
pub use session::{Session, Stream, StreamWriter};
