//! One request as the guest sent it, and the answer being written.
//!
//! Every length and number in a request is the guest's word. Reading past the end of a body is
//! EINVAL; an answer has a fixed size that nothing grows beyond.

use crate::wire::{self, IN_HEADER, MAX_MESSAGE, OUT_HEADER};
use rustix::io::Errno;
use std::ffi::CStr;

/// Result of one operation: what the guest is told.
pub type Answer<T = ()> = Result<T, Errno>;

/// `struct fuse_in_header` and what follows it.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    pub opcode: u32,
    pub unique: u64,
    pub node: u64,
    pub uid: u32,
    pub gid: u32,
    pub body: &'a [u8],
}

impl<'a> Request<'a> {
    /// `message` is as long as its header says and holds at least the header.
    pub fn new(message: &'a [u8]) -> Self {
        Self {
            opcode: wire::u32_at(message, 4),
            unique: wire::u64_at(message, 8),
            node: wire::u64_at(message, 16),
            uid: wire::u32_at(message, 24),
            gid: wire::u32_at(message, 28),
            body: message.get(IN_HEADER..).unwrap_or_default(),
        }
    }

    pub fn arguments(&self) -> Arguments<'a> {
        Arguments(self.body)
    }
}

/// The rest of a body that is still to be read.
#[derive(Debug)]
pub struct Arguments<'a>(&'a [u8]);

impl<'a> Arguments<'a> {
    pub fn bytes(&mut self, count: usize) -> Answer<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(count).ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(bytes)
    }

    pub fn u32(&mut self) -> Answer<u32> {
        Ok(wire::u32_at(self.bytes(4)?, 0))
    }

    pub fn u64(&mut self) -> Answer<u64> {
        Ok(wire::u64_at(self.bytes(8)?, 0))
    }

    /// Bytes that end with NUL.
    pub fn string(&mut self) -> Answer<&'a CStr> {
        let string = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.bytes(string.count_bytes() + 1)?;
        Ok(string)
    }

    /// The name of a file in a folder: nothing that could lead elsewhere.
    pub fn name(&mut self) -> Answer<&'a CStr> {
        let name = self.string()?;
        match name.to_bytes() {
            b"" | b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            bytes if bytes.len() > 255 => Err(Errno::NAMETOOLONG),
            _ => Ok(name),
        }
    }
}

/// An answer. Its memory is used again for the next one.
#[derive(Debug)]
pub struct Reply {
    bytes: Vec<u8>,
    length: usize,
}

impl Reply {
    pub fn new() -> Self {
        Self {
            // Zeroed memory that nobody has written to costs no page.
            bytes: vec![0; MAX_MESSAGE],
            length: OUT_HEADER,
        }
    }

    pub fn clear(&mut self) {
        self.length = OUT_HEADER;
    }

    /// Bytes written behind the header.
    pub fn len(&self) -> usize {
        self.length - OUT_HEADER
    }

    /// Takes back what was written after `len` was this.
    pub fn truncate(&mut self, len: usize) {
        self.length = self.length.min(OUT_HEADER + len);
    }

    pub fn bytes(&mut self, bytes: &[u8]) -> Answer {
        self.room(bytes.len())?.copy_from_slice(bytes);
        self.took(bytes.len());
        Ok(())
    }

    pub fn u32(&mut self, number: u32) -> Answer {
        self.bytes(&number.to_ne_bytes())
    }

    pub fn u64(&mut self, number: u64) -> Answer {
        self.bytes(&number.to_ne_bytes())
    }

    /// Space for `size` bytes, to be written directly and then counted with [`took`](Self::took).
    pub fn room(&mut self, size: usize) -> Answer<&mut [u8]> {
        let end = self.length.checked_add(size).ok_or(Errno::INVAL)?;
        self.bytes.get_mut(self.length..end).ok_or(Errno::INVAL)
    }

    pub fn took(&mut self, size: usize) {
        self.length = self.bytes.len().min(self.length + size);
    }

    /// The whole message: what was written, or the error alone.
    pub fn finish(&mut self, unique: u64, answer: Answer) -> &[u8] {
        let error = match answer {
            Ok(()) => 0,
            Err(error) => {
                self.clear();
                -error.raw_os_error()
            }
        };
        let header = wire::out_header(self.length, error, unique);
        self.bytes[..OUT_HEADER].copy_from_slice(&header);
        &self.bytes[..self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_that_ends_early_is_invalid() {
        let mut arguments = Arguments(&[1, 0, 0, 0, 2, 0, 0]);
        assert_eq!(arguments.u32(), Ok(1));
        assert_eq!(arguments.u32(), Err(Errno::INVAL));
        assert_eq!(Arguments(b"no end").string(), Err(Errno::INVAL));
        assert_eq!(Arguments(&[0; 7]).u64(), Err(Errno::INVAL));
        assert_eq!(Arguments(&[0; 7]).bytes(usize::MAX), Err(Errno::INVAL));
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for bad in ["\0", ".\0", "..\0", "a/b\0", "/\0", "../x\0"] {
            let mut arguments = Arguments(bad.as_bytes());
            assert_eq!(arguments.name(), Err(Errno::INVAL), "{bad:?}");
        }
        let long = "x".repeat(256) + "\0";
        assert_eq!(Arguments(long.as_bytes()).name(), Err(Errno::NAMETOOLONG));
        assert_eq!(Arguments(b"...\0rest").name(), Ok(c"..."));
    }

    #[test]
    fn an_answer_never_grows_beyond_its_buffer() {
        let mut reply = Reply::new();
        assert!(reply.room(MAX_MESSAGE - OUT_HEADER).is_ok());
        assert_eq!(reply.room(MAX_MESSAGE - OUT_HEADER + 1).err(), Some(Errno::INVAL));
        assert_eq!(reply.room(usize::MAX).err(), Some(Errno::INVAL));
        reply.took(usize::MAX / 2);
        assert_eq!(reply.finish(1, Ok(())).len(), MAX_MESSAGE);
        assert_eq!(reply.finish(1, Err(Errno::IO)).len(), OUT_HEADER);
    }
}
