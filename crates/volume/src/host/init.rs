//! FUSE_INIT: the one message whose answer fixes what all others mean.
//!
//! The answer depends on the request alone. So the server of a clone, whose guest was answered
//! before the template was saved, computes it again and knows what was agreed on.

use crate::wire::{self, IN_HEADER, MAX_MESSAGE, MAX_WRITE, OUT_HEADER, opcode};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

const MAJOR: u32 = 7;
/// The version this server was written for.
const MINOR: u32 = 41;
/// Below it, lengths of common messages differ (Linux 4.20 has 28).
const OLDEST_MINOR: u32 = 31;
/// Requests that readers ahead may queue.
const MAX_BACKGROUND: u16 = 64;

mod flag {
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const ATOMIC_O_TRUNC: u64 = 1 << 3;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const AUTO_INVAL_DATA: u64 = 1 << 12;
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    pub const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub const ASYNC_DIO: u64 = 1 << 15;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const CACHE_SYMLINKS: u64 = 1 << 23;
    pub const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub const INIT_EXT: u64 = 1 << 30;
    pub const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
    pub const ALLOW_IDMAP: u64 = 1 << 40;
}

/// What is wished for. Not among them: WRITEBACK_CACHE (the host's view would lag), locks (the
/// guest's kernel keeps them; a lock does not reach beyond the pod), POSIX_ACL.
const WANTED: u64 = flag::ASYNC_READ
    | flag::ATOMIC_O_TRUNC
    | flag::BIG_WRITES
    | flag::AUTO_INVAL_DATA
    | flag::DO_READDIRPLUS
    | flag::READDIRPLUS_AUTO
    | flag::ASYNC_DIO
    | flag::PARALLEL_DIROPS
    | flag::MAX_PAGES
    | flag::CACHE_SYMLINKS
    | flag::HANDLE_KILLPRIV_V2
    | flag::INIT_EXT
    | flag::DIRECT_IO_ALLOW_MMAP
    | flag::ALLOW_IDMAP;
/// Without these the server's answers would be read wrongly.
const NEEDED: u64 = flag::MAX_PAGES | flag::BIG_WRITES;

/// The answer to FUSE_INIT, header included; `None` when `request` is not one this server can
/// work with.
pub fn answer(request: &[u8]) -> Option<Vec<u8>> {
    let body = request.get(IN_HEADER..)?;
    let length_fits = wire::u32_at(request, 0) as usize == request.len();
    if !length_fits || wire::u32_at(request, 4) != opcode::INIT || body.len() < 16 {
        return None;
    }
    let (major, minor) = (wire::u32_at(body, 0), wire::u32_at(body, 4));
    let mut offered = u64::from(wire::u32_at(body, 12));
    if offered & flag::INIT_EXT != 0 {
        offered |= u64::from(wire::u32_at(body, 16)) << 32;
    }
    if major != MAJOR || minor < OLDEST_MINOR || offered & NEEDED != NEEDED {
        return None;
    }
    let agreed = offered & WANTED;
    const BODY: usize = 64;
    let mut reply = Vec::with_capacity(OUT_HEADER + BODY);
    let unique = wire::u64_at(request, 8);
    reply.extend_from_slice(&wire::out_header(OUT_HEADER + BODY, 0, unique));
    for number in [MAJOR, minor.min(MINOR), MAX_WRITE as u32, agreed as u32] {
        reply.extend_from_slice(&number.to_ne_bytes());
    }
    reply.extend_from_slice(&MAX_BACKGROUND.to_ne_bytes());
    reply.extend_from_slice(&(MAX_BACKGROUND / 4 * 3).to_ne_bytes()); // congestion threshold
    reply.extend_from_slice(&(MAX_WRITE as u32).to_ne_bytes());
    reply.extend_from_slice(&1u32.to_ne_bytes()); // granularity of times: ns
    reply.extend_from_slice(&((MAX_WRITE / 4096) as u16).to_ne_bytes()); // pages of a message
    reply.extend_from_slice(&0u16.to_ne_bytes()); // no DAX
    reply.extend_from_slice(&((agreed >> 32) as u32).to_ne_bytes());
    reply.resize(OUT_HEADER + BODY, 0);
    Some(reply)
}

/// For the template's builder: reads the guest's FUSE_INIT, answers it and returns it, to be given
/// to [`serve`](super::serve) of each clone. Ends with an error when the stream does.
pub fn handshake(stream: &UnixStream) -> io::Result<Vec<u8>> {
    let mut request = vec![0; IN_HEADER];
    read_exact(stream, &mut request)?;
    let length = wire::u32_at(&request, 0) as usize;
    if !(IN_HEADER..=MAX_MESSAGE).contains(&length) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    request.resize(length, 0);
    read_exact(stream, &mut request[IN_HEADER..])?;
    let reply = answer(&request).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            "the guest's FUSE is too old or its first message is not FUSE_INIT",
        )
    })?;
    write_all(stream, &reply)?;
    Ok(request)
}

/// `read_exact` for a stream that may be non-blocking.
pub fn read_exact(mut stream: &UnixStream, mut bytes: &mut [u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match stream.read(bytes) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => bytes = &mut bytes[count..],
            Err(error) => retry(stream, error, PollFlags::IN)?,
        }
    }
    Ok(())
}

/// `write_all` for a stream that may be non-blocking.
pub fn write_all(mut stream: &UnixStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match stream.write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) => retry(stream, error, PollFlags::OUT)?,
        }
    }
    Ok(())
}

fn retry(stream: &UnixStream, error: io::Error, wanted: PollFlags) -> io::Result<()> {
    match Errno::from_io_error(&error) {
        Some(Errno::INTR) => Ok(()),
        Some(Errno::AGAIN) => match poll(&mut [PollFd::new(stream, wanted)], None) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        },
        _ => Err(error),
    }
}
