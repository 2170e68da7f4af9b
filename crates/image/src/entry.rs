//! Reading a tar archive, entry by entry, with bounds on what an entry's description may cost.
//!
//! The blocks are decoded by the `tar` crate. The stream is ours: extended headers are read into memory
//! only up to a limit, and attribute values may hold any byte, line ends too.

use std::io::{self, Read};
use tar::{EntryType, Header};

const BLOCK: u64 = 512;
/// The largest extended header that is read (Go's reader has the same limit).
const LARGEST_HEADER: u64 = 1 << 20;
const XATTR: &[u8] = b"SCHILY.xattr.";

/// An archive that is none, or one with things this program does not unpack.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ArchiveError {
    /// The bytes are no tar archive.
    #[error("{0}")]
    Malformed(String),
    /// The bytes could not be read or decompressed.
    #[error("read the archive")]
    Read(#[from] io::Error),
}

fn malformed<T>(why: impl Into<String>) -> Result<T, ArchiveError> {
    Err(ArchiveError::Malformed(why.into()))
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EntryKind {
    File,
    Directory,
    Symlink,
    Hardlink,
    Character,
    Block,
    Fifo,
}

/// One entry; its data, if it is a file, comes next in the archive.
#[derive(Debug)]
pub(crate) struct Entry {
    pub kind: EntryKind,
    pub path: Vec<u8>,
    pub link: Vec<u8>,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    /// Seconds and nanoseconds.
    pub mtime: (i64, u32),
    pub device: (u32, u32),
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// A tar archive being read.
pub(crate) struct Archive<R> {
    reader: R,
    /// Data of the current entry that nobody has read, and its padding.
    data: u64,
    padding: u64,
}

/// What extended headers say about the next entry.
#[derive(Default)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl<R: Read> Archive<R> {
    pub fn new(reader: R) -> Self {
        Self { reader, data: 0, padding: 0 }
    }

    /// The next entry; `None` at the end.
    pub fn next(&mut self) -> Result<Option<Entry>, ArchiveError> {
        let mut extended = Extended::default();
        let mut described = false;
        loop {
            self.skip()?;
            let Some(header) = self.header()? else {
                return if described {
                    malformed("it ends after the description of an entry")
                } else {
                    Ok(None)
                };
            };
            match header.entry_type() {
                EntryType::XGlobalHeader => {
                    self.expect_data(self.size(&header)?);
                    continue;
                }
                EntryType::XHeader => {
                    let bytes = self.description(&header)?;
                    extended.read(&bytes)?;
                }
                EntryType::GNULongName => extended.path = Some(text(self.description(&header)?)),
                EntryType::GNULongLink => extended.link = Some(text(self.description(&header)?)),
                _ => return self.entry(&header, extended).map(Some),
            }
            described = true;
        }
    }

    /// The data of the entry that [`Self::next`] gave.
    pub fn data(&mut self) -> Data<'_, R> {
        Data(self)
    }

    fn entry(&mut self, header: &Header, extended: Extended) -> Result<Entry, ArchiveError> {
        let path = extended.path.unwrap_or_else(|| header.path_bytes().into_owned());
        let kind = match header.entry_type() {
            // Archives older than the type for folders mark them by the name.
            EntryType::Regular if path.ends_with(b"/") => EntryKind::Directory,
            EntryType::Regular | EntryType::Continuous => EntryKind::File,
            EntryType::Directory => EntryKind::Directory,
            EntryType::Symlink => EntryKind::Symlink,
            EntryType::Link => EntryKind::Hardlink,
            EntryType::Char => EntryKind::Character,
            EntryType::Block => EntryKind::Block,
            EntryType::Fifo => EntryKind::Fifo,
            other => {
                return malformed(format!(
                    "{} is of type {:?}, which is not supported",
                    String::from_utf8_lossy(&path),
                    char::from(other.as_byte())
                ));
            }
        };
        let size = match kind {
            EntryKind::File => match extended.size {
                Some(size) => size,
                None => self.size(header)?,
            },
            _ => 0,
        };
        self.expect_data(size);
        let field = |value: io::Result<u64>, name| match value {
            Ok(value) => Ok(value),
            Err(error) => {
                malformed(format!("{name} of {}: {error}", String::from_utf8_lossy(&path)))
            }
        };
        let id = |value: u64, name| match u32::try_from(value) {
            Ok(value) if value != u32::MAX => Ok(value),
            _ => malformed(format!("{name} of {} is {value}", String::from_utf8_lossy(&path))),
        };
        let uid = match extended.uid {
            Some(uid) => uid,
            None => field(header.uid(), "owner")?,
        };
        let gid = match extended.gid {
            Some(gid) => gid,
            None => field(header.gid(), "group")?,
        };
        let mtime = match extended.mtime {
            Some(mtime) => mtime,
            // Negative seconds, from before 1970, are in two's complement.
            None => (field(header.mtime(), "time")?.cast_signed(), 0),
        };
        let device = match kind {
            EntryKind::Character | EntryKind::Block => (
                field(header.device_major().map(|n| u64::from(n.unwrap_or(0))), "device")?,
                field(header.device_minor().map(|n| u64::from(n.unwrap_or(0))), "device")?,
            ),
            _ => (0, 0),
        };
        Ok(Entry {
            kind,
            link: extended
                .link
                .unwrap_or_else(|| header.link_name_bytes().unwrap_or_default().into_owned()),
            mode: u32::try_from(field(header.mode().map(u64::from), "mode")? & 0o7777).unwrap_or(0),
            uid: id(uid, "owner")?,
            gid: id(gid, "group")?,
            size,
            mtime,
            device: (id(device.0, "device")?, id(device.1, "device")?),
            xattrs: extended.xattrs,
            path,
        })
    }

    /// The next block as a header; `None` at the end of the archive.
    fn header(&mut self) -> Result<Option<Header>, ArchiveError> {
        let mut header = Header::new_old();
        let block = header.as_mut_bytes();
        let mut filled = 0;
        while filled < block.len() {
            match self.reader.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return malformed("it ends in the middle of a header"),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        if block.iter().all(|&byte| byte == 0) {
            return Ok(None);
        }
        let sum = block.iter().map(|&byte| u32::from(byte)).sum::<u32>();
        let own = block[148..156].iter().map(|&byte| u32::from(byte)).sum::<u32>();
        // The checksum counts its own field as blanks.
        match header.cksum() {
            Ok(checksum) if checksum == sum - own + 8 * u32::from(b' ') => Ok(Some(header)),
            _ => malformed("a header's checksum is wrong"),
        }
    }

    fn size(&self, header: &Header) -> Result<u64, ArchiveError> {
        header.entry_size().or_else(|error| malformed(format!("size of an entry: {error}")))
    }

    fn expect_data(&mut self, size: u64) {
        self.data = size;
        self.padding = (BLOCK - size % BLOCK) % BLOCK;
    }

    fn description(&mut self, header: &Header) -> Result<Vec<u8>, ArchiveError> {
        let size = self.size(header)?;
        if size > LARGEST_HEADER {
            return malformed(format!("a header has {size} bytes"));
        }
        self.expect_data(size);
        let mut bytes = Vec::new();
        self.data().read_to_end(&mut bytes)?;
        if bytes.len() as u64 != size {
            return malformed("it ends in the middle of a header");
        }
        Ok(bytes)
    }

    /// Passes over what nobody read of the current entry.
    fn skip(&mut self) -> Result<(), ArchiveError> {
        let rest = self.data.checked_add(self.padding);
        let Some(rest) = rest else { return malformed("an entry is too large") };
        let skipped = io::copy(&mut (&mut self.reader).take(rest), &mut io::sink())?;
        // The padding of the last entry may be missing.
        if skipped < self.data {
            return malformed("it ends in the middle of a file");
        }
        (self.data, self.padding) = (0, 0);
        Ok(())
    }
}

/// Data of one entry.
pub(crate) struct Data<'a, R>(&'a mut Archive<R>);

impl<R: Read> Read for Data<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.0.data).unwrap_or(usize::MAX).min(buffer.len());
        let count = self.0.reader.read(&mut buffer[..most])?;
        self.0.data -= count as u64;
        Ok(count)
    }
}

/// GNU names end at the first zero.
fn text(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    bytes.truncate(end);
    bytes
}

impl Extended {
    /// Reads PAX records: `LENGTH KEY=VALUE\n`.
    fn read(&mut self, mut bytes: &[u8]) -> Result<(), ArchiveError> {
        while !bytes.is_empty() {
            let record = record(bytes);
            let Some((key, value, rest)) = record else {
                return malformed("an extended header is no list of records");
            };
            bytes = rest;
            let number =
                || std::str::from_utf8(value).ok().and_then(|text| text.parse::<u64>().ok());
            let known = match key {
                // An empty value takes back what came before.
                b"path" => {
                    self.path = Some(value.to_vec()).filter(|path| !path.is_empty());
                    Some(())
                }
                b"linkpath" => {
                    self.link = Some(value.to_vec()).filter(|path| !path.is_empty());
                    Some(())
                }
                b"size" => number().map(|size| self.size = Some(size)),
                b"uid" => number().map(|uid| self.uid = Some(uid)),
                b"gid" => number().map(|gid| self.gid = Some(gid)),
                b"mtime" => time(value).map(|mtime| self.mtime = Some(mtime)),
                _ => {
                    if key.starts_with(b"GNU.sparse.") {
                        return malformed("it has sparse files, which are not supported");
                    }
                    if let Some(name) = key.strip_prefix(XATTR) {
                        self.xattrs.push((name.to_vec(), value.to_vec()));
                    }
                    Some(())
                }
            };
            if known.is_none() {
                return malformed(format!(
                    "an extended header has {} = {:?}",
                    String::from_utf8_lossy(key),
                    String::from_utf8_lossy(value)
                ));
            }
        }
        Ok(())
    }
}

/// The first record's key and value, and what follows it.
fn record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let blank = bytes.iter().take(20).position(|&byte| byte == b' ')?;
    let length: usize = std::str::from_utf8(&bytes[..blank]).ok()?.parse().ok()?;
    let record = bytes.get(blank + 1..length)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|&byte| byte == b'=')?;
    Some((&record[..equals], &record[equals + 1..], &bytes[length..]))
}

/// `SECONDS.FRACTION`, possibly negative.
fn time(value: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(value).ok()?;
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    if !fraction.bytes().all(|c| c.is_ascii_digit()) {
        return None;
    }
    let nanoseconds: u32 = format!("{fraction:0<9}").get(..9)?.parse().ok()?;
    let whole: i64 = seconds.parse().ok()?;
    match (text.starts_with('-'), nanoseconds) {
        (true, 1..) => Some((whole.checked_sub(1)?, 1_000_000_000 - nanoseconds)),
        _ => Some((whole, nanoseconds)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(kind: EntryType, path: &str, size: u64) -> Header {
        let mut header = Header::new_ustar();
        header.set_path(path).unwrap();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(0o644);
        header.set_uid(1);
        header.set_gid(2);
        header.set_mtime(3);
        header.set_cksum();
        header
    }

    fn archive(parts: &[(Header, &[u8])]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (header, data) in parts {
            bytes.extend_from_slice(header.as_bytes());
            bytes.extend_from_slice(data);
            bytes.resize(bytes.len().next_multiple_of(512), 0);
        }
        bytes.resize(bytes.len() + 1024, 0);
        bytes
    }

    fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut length = rest + 1;
            while length != rest + length.to_string().len() {
                length = rest + length.to_string().len();
            }
            bytes.extend_from_slice(format!("{length} {key}=").as_bytes());
            bytes.extend_from_slice(value);
            bytes.push(b'\n');
        }
        bytes
    }

    #[test]
    fn extended_headers_are_applied_to_the_next_entry_only() {
        let records = pax(&[
            ("path", "ü/name".as_bytes()),
            ("uid", b"70000"),
            ("mtime", b"-1.25"),
            ("SCHILY.xattr.security.capability", b"a\nb=\0c"),
        ]);
        let bytes = archive(&[
            (header(EntryType::XHeader, "x", records.len() as u64), &records),
            (header(EntryType::Regular, "short", 3), b"abc"),
            (header(EntryType::Directory, "d/", 0), b""),
        ]);
        let mut archive = Archive::new(&bytes[..]);
        let entry = archive.next().unwrap().unwrap();
        assert_eq!(entry.path, "ü/name".as_bytes());
        assert_eq!((entry.uid, entry.gid, entry.mtime), (70000, 2, (-2, 750_000_000)));
        assert_eq!(entry.xattrs, [(b"security.capability".to_vec(), b"a\nb=\0c".to_vec())]);
        let mut data = String::new();
        archive.data().read_to_string(&mut data).unwrap();
        assert_eq!(data, "abc");
        let entry = archive.next().unwrap().unwrap();
        assert_eq!(
            (entry.path.as_slice(), entry.kind, entry.uid),
            (&b"d/"[..], EntryKind::Directory, 1)
        );
        assert!(entry.xattrs.is_empty() && archive.next().unwrap().is_none());
    }

    #[test]
    fn what_cannot_be_unpacked_as_meant_is_refused() {
        let sparse = pax(&[("GNU.sparse.major", b"1")]);
        let cases: &[(&str, Vec<u8>)] = &[
            ("sparse", archive(&[(header(EntryType::XHeader, "x", sparse.len() as u64), &sparse)])),
            ("not supported", archive(&[(header(EntryType::GNUSparse, "x", 0), b"")])),
            ("bytes", archive(&[(header(EntryType::XHeader, "x", 1 << 40), b"")])),
            ("checksum", vec![1; 1024]),
            ("middle of a header", header(EntryType::Regular, "x", 0).as_bytes()[..100].to_vec()),
            ("after the description", archive(&[(header(EntryType::GNULongName, "x", 1), b"y")])),
            ("records", archive(&[(header(EntryType::XHeader, "x", 3), b"abc")])),
        ];
        for (part, bytes) in cases {
            let mut archive = Archive::new(&bytes[..]);
            let error = (0..3).find_map(|_| archive.next().err()).expect(part);
            assert!(error.to_string().contains(part), "{part}: {error}");
        }
        let cut = archive(&[(header(EntryType::Regular, "x", 3000), &[1; 3000])]);
        let mut archive = Archive::new(&cut[..2000]);
        archive.next().unwrap();
        assert!(archive.next().unwrap_err().to_string().contains("middle of a file"));
    }

    proptest! {
        #[test]
        fn no_bytes_upset_the_reader(
            seed in proptest::collection::vec(any::<u8>(), 0..600),
            kind in proptest::sample::select(b"xgLK012345670S".as_slice()),
            size in 0u64..1500,
        ) {
            let mut first = header(EntryType::new(kind), "a/b", size);
            first.set_cksum();
            let mut bytes = first.as_bytes().to_vec();
            bytes.extend(&seed);
            let mut archive = Archive::new(&bytes[..]);
            while let Ok(Some(_)) = archive.next() {}
        }
    }
}
