//! Header blocks: name and value pairs, compressed with zlib over the whole life of the connection and
//! primed with SPDY/3's dictionary.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

/// Names in lower case with their values, in the order of the block.
pub type Headers = Vec<(String, String)>;

/// The largest block that is unpacked: a bomb is noticed before it goes off.
const LARGEST_BLOCK: usize = 64 << 10;
const MOST_HEADERS: u32 = 256;

/// Names that begin the dictionary, each with its length before it.
const NAMES: [&str; 65] = [
    "options",
    "head",
    "post",
    "put",
    "delete",
    "trace",
    "accept",
    "accept-charset",
    "accept-encoding",
    "accept-language",
    "accept-ranges",
    "age",
    "allow",
    "authorization",
    "cache-control",
    "connection",
    "content-base",
    "content-encoding",
    "content-language",
    "content-length",
    "content-location",
    "content-md5",
    "content-range",
    "content-type",
    "date",
    "etag",
    "expect",
    "expires",
    "from",
    "host",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "last-modified",
    "location",
    "max-forwards",
    "pragma",
    "proxy-authenticate",
    "proxy-authorization",
    "range",
    "referer",
    "retry-after",
    "server",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "user-agent",
    "vary",
    "via",
    "warning",
    "www-authenticate",
    "method",
    "get",
    "status",
    "200 OK",
    "version",
    "HTTP/1.1",
    "url",
    "public",
    "set-cookie",
    "keep-alive",
    "origin",
];
/// What follows them.
const REST: &str = concat!(
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505",
    "203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized",
    "403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable",
    "Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT",
    "chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,",
    "text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0.",
);

/// A header block is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// zlib does not understand it.
    #[error("a header block cannot be unpacked")]
    Compression,
    /// It is larger than headers are.
    #[error("a header block has more than {LARGEST_BLOCK} bytes or {MOST_HEADERS} headers")]
    TooLarge,
    /// It is no list of headers.
    #[error("a header block is no list of headers")]
    Malformed,
}

fn dictionary() -> Vec<u8> {
    let mut bytes = Vec::new();
    for name in NAMES {
        bytes.put_u32(name.len() as u32);
        bytes.put_slice(name.as_bytes());
    }
    bytes.put_slice(REST.as_bytes());
    bytes
}

/// Unpacks one side's blocks, in order.
#[derive(Debug)]
pub struct Decompressor(Decompress);

impl Default for Decompressor {
    fn default() -> Self {
        Self(Decompress::new(true))
    }
}

impl Decompressor {
    /// The headers of the next block.
    ///
    /// # Errors
    /// It is none; the connection cannot go on.
    pub fn unpack(&mut self, block: &[u8]) -> Result<Headers, HeaderError> {
        let mut plain = Vec::with_capacity(1024);
        let mut rest = block;
        loop {
            let (read, written) = (self.0.total_in(), self.0.total_out());
            let result = self.0.decompress_vec(rest, &mut plain, FlushDecompress::Sync);
            let taken = usize::try_from(self.0.total_in() - read).unwrap_or(rest.len());
            rest = &rest[taken.min(rest.len())..];
            match result {
                Ok(Status::StreamEnd) => return Err(HeaderError::Compression),
                Ok(_) => {}
                Err(error) if error.needs_dictionary().is_some() => {
                    self.0.set_dictionary(&dictionary()).map_err(|_| HeaderError::Compression)?;
                    continue;
                }
                Err(_) => return Err(HeaderError::Compression),
            }
            if plain.len() > LARGEST_BLOCK {
                return Err(HeaderError::TooLarge);
            }
            if plain.len() == plain.capacity() {
                plain.reserve(plain.len());
            } else if rest.is_empty() || (taken == 0 && self.0.total_out() == written) {
                return parse(&plain);
            }
        }
    }
}

fn parse(mut block: &[u8]) -> Result<Headers, HeaderError> {
    let count = block.try_get_u32().map_err(|_| HeaderError::Malformed)?;
    if count > MOST_HEADERS {
        return Err(HeaderError::TooLarge);
    }
    let mut text = || {
        let length = block.try_get_u32().ok()? as usize;
        let text = std::str::from_utf8(block.get(..length)?).ok()?.to_owned();
        block.advance(length);
        Some(text)
    };
    (0..count)
        .map(|_| Some((text()?.to_ascii_lowercase(), text()?)))
        .collect::<Option<_>>()
        .ok_or(HeaderError::Malformed)
}

/// Packs one side's blocks, in order.
#[derive(Debug)]
pub struct Compressor(Compress);

impl Default for Compressor {
    fn default() -> Self {
        let mut compress = Compress::new(Compression::default(), true);
        // Only a used stream refuses a dictionary; without it clients would still understand.
        compress.set_dictionary(&dictionary()).ok();
        Self(compress)
    }
}

impl Compressor {
    /// The block of these headers.
    pub fn pack(&mut self, headers: &[(&str, &str)]) -> Bytes {
        let mut plain = BytesMut::new();
        plain.put_u32(headers.len() as u32);
        for (name, value) in headers {
            for text in [name, value] {
                plain.put_u32(text.len() as u32);
                plain.put_slice(text.as_bytes());
            }
        }
        let mut packed = Vec::with_capacity(plain.len() + 64);
        let mut rest: &[u8] = &plain;
        loop {
            let read = self.0.total_in();
            if self.0.compress_vec(rest, &mut packed, FlushCompress::Sync).is_err() {
                break;
            }
            rest = &rest[usize::try_from(self.0.total_in() - read).unwrap_or(rest.len())..];
            if rest.is_empty() && packed.len() < packed.capacity() {
                break;
            }
            packed.reserve(256);
        }
        packed.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// SHA-free check: length and Adler-32 are the draft's.
    #[test]
    fn the_dictionary_is_spdys() {
        let bytes = dictionary();
        assert_eq!(bytes.len(), 1423);
        let (mut a, mut b) = (1u32, 0u32);
        for byte in bytes {
            a = (a + u32::from(byte)) % 65521;
            b = (b + a) % 65521;
        }
        assert_eq!((b << 16) | a, 0xe3c6_a7c2);
    }

    #[test]
    fn blocks_depend_on_those_before_and_read_back() {
        let (mut packer, mut unpacker) = (Compressor::default(), Decompressor::default());
        for _ in 0..3 {
            let block = packer.pack(&[("streamtype", "stdin"), ("port", "80")]);
            let expected =
                vec![("streamtype".into(), "stdin".into()), ("port".into(), "80".into())];
            assert_eq!(unpacker.unpack(&block), Ok(expected));
        }
        let large = "x".repeat(5000);
        let block = packer.pack(&[("streamtype", &large)]);
        assert_eq!(unpacker.unpack(&block).unwrap()[0].1, large);
        assert_eq!(unpacker.unpack(&packer.pack(&[])), Ok(Vec::new()));
    }

    #[test]
    fn a_bomb_does_not_go_off() {
        let (mut packer, mut unpacker) = (Compressor::default(), Decompressor::default());
        let bomb = packer.pack(&[("a", &"0".repeat(64 << 20))]);
        assert!(bomb.len() < 256 << 10);
        assert_eq!(unpacker.unpack(&bomb), Err(HeaderError::TooLarge));
    }

    proptest! {
        #[test]
        fn no_bytes_upset_the_unpacker(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            Decompressor::default().unpack(&bytes).ok();
            parse(&bytes).ok();
        }
    }
}
