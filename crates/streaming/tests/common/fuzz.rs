//! Damaged SPDY, made from a seed: what the parsers do with it must not depend on how it is cut, and must
//! stay within their bounds.

use a3s_box_streaming::spdy::{Compressor, Decompressor, Frame, LARGEST_CONTROL, Reader, flag};
use bytes::{Bytes, BytesMut};
use rand::{RngExt, SeedableRng, rngs::SmallRng};

/// What a control frame has before its length is known.
const HEAD: usize = 8;
/// What a block of headers may unpack to.
const LARGEST_BLOCK: usize = 64 << 10;
const MOST_HEADERS: usize = 256;

/// What was seen.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Frames that were understood.
    pub frames: u64,
    /// Headers that were unpacked.
    pub headers: u64,
    /// Inputs that were refused.
    pub refused: u64,
}

impl Report {
    fn add(&mut self, other: &Self) {
        self.frames += other.frames;
        self.headers += other.headers;
        self.refused += other.refused;
    }
}

/// Runs so many inputs.
pub fn run(count: u64, seed: u64) -> Report {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut report = Report::default();
    for _ in 0..count {
        let input = damaged(&mut rng);
        let cuts: Vec<_> =
            (0..rng.random_range(1..6)).map(|_| rng.random_range(0..=input.len())).collect();
        report.add(&check(&input, &cuts));
    }
    report
}

/// Reads the bytes as a whole and in pieces, which must make no difference.
pub fn check(input: &[u8], cuts: &[usize]) -> Report {
    let (mut report, mut again) = (Report::default(), Report::default());
    let whole = parse(input, &[], &mut report);
    assert_eq!(whole, parse(input, cuts, &mut again), "cut at {cuts:?}: {input:02x?}");
    report
}

/// A conversation with some bytes other than they should be.
fn damaged(rng: &mut SmallRng) -> Vec<u8> {
    let mut bytes = BytesMut::new();
    let mut compressor = Compressor::default();
    for _ in 0..rng.random_range(1..6) {
        frame(rng, &mut compressor).write(&mut bytes);
    }
    let mut bytes = bytes.to_vec();
    for _ in 0..rng.random_range(0..4) {
        damage(rng, &mut bytes);
    }
    bytes
}

fn frame(rng: &mut SmallRng, compressor: &mut Compressor) -> Frame {
    let (id, flags) = (rng.random_range(0..9), rng.random_range(0..3));
    let large = "x".repeat(1 << rng.random_range(0..18));
    let headers = [("streamtype", "data"), ("port", "80"), ("requestid", &*large)];
    let block = compressor.pack(&headers[..rng.random_range(0..=3)]);
    match rng.random_range(0..10) {
        0..3 => Frame::SynStream { id, flags, block },
        3 => Frame::SynReply { id, flags, block },
        4 => Frame::Headers { id, flags, block },
        5 => Frame::RstStream { id, status: 5 },
        6 => Frame::Ping(id),
        7 => Frame::GoAway { last: id, status: 0 },
        8 => Frame::WindowUpdate { id, delta: 1 },
        _ => {
            let bytes = Bytes::from(vec![7; rng.random_range(0..200)]);
            Frame::Data { id: id | 1, flags: flags & flag::FIN, bytes }
        }
    }
}

fn damage(rng: &mut SmallRng, bytes: &mut Vec<u8>) {
    if bytes.is_empty() {
        return;
    }
    let place = rng.random_range(0..bytes.len());
    let end = (place + rng.random_range(0..32)).min(bytes.len());
    match rng.random_range(0..6) {
        0 => bytes[place] ^= 1 << rng.random_range(0..8),
        1 => bytes[place] = [0, 1, 0x7f, 0x80, 0xff][rng.random_range(0..5)],
        2 => bytes.truncate(place),
        3 => drop(bytes.drain(place..end)),
        4 => {
            let copy = bytes[place..end].to_vec();
            bytes.splice(place..place, copy);
        }
        _ => {
            let noise: Vec<u8> = (place..end).map(|_| rng.random()).collect();
            bytes.splice(place..place, noise);
        }
    }
}

/// What comes out, with the pieces of data put together.
#[derive(Debug, PartialEq, Eq)]
enum Item {
    Frame(Frame),
    Headers(Vec<(String, String)>),
    Data { id: u32, bytes: Vec<u8>, ended: bool },
    Refused,
}

fn parse(input: &[u8], cuts: &[usize], report: &mut Report) -> Vec<Item> {
    let mut cuts = cuts.to_vec();
    cuts.extend([0, input.len()]);
    cuts.sort_unstable();
    let (mut reader, mut buffer, mut decompressor) =
        (Reader::default(), BytesMut::new(), Decompressor::default());
    let mut items = Vec::new();
    for part in cuts.windows(2) {
        buffer.extend_from_slice(&input[part[0]..part[1]]);
        loop {
            match reader.next(&mut buffer) {
                Ok(Some(frame)) => {
                    report.frames += 1;
                    if !take(frame, &mut decompressor, &mut items, report) {
                        return items;
                    }
                }
                Ok(None) => break,
                Err(_) => {
                    report.refused += 1;
                    items.push(Item::Refused);
                    return items;
                }
            }
        }
        assert!(buffer.len() < HEAD + LARGEST_CONTROL, "waits for more than a frame can have");
    }
    items
}

/// False: the connection is over.
fn take(
    frame: Frame,
    decompressor: &mut Decompressor,
    items: &mut Vec<Item>,
    report: &mut Report,
) -> bool {
    match frame {
        Frame::SynStream { block, .. }
        | Frame::SynReply { block, .. }
        | Frame::Headers { block, .. } => {
            let Ok(headers) = decompressor.unpack(&block) else {
                report.refused += 1;
                items.push(Item::Refused);
                return false;
            };
            let bytes: usize = headers.iter().map(|(name, value)| name.len() + value.len()).sum();
            assert!(bytes <= LARGEST_BLOCK && headers.len() <= MOST_HEADERS);
            report.headers += 1;
            items.push(Item::Headers(headers));
        }
        Frame::Data { id, flags, bytes } => match items.last_mut() {
            Some(Item::Data { id: last, bytes: before, ended }) if *last == id && !*ended => {
                before.extend_from_slice(&bytes);
                *ended = flags & flag::FIN != 0;
            }
            _ => {
                items.push(Item::Data { id, bytes: bytes.to_vec(), ended: flags & flag::FIN != 0 })
            }
        },
        frame => items.push(Item::Frame(frame)),
    }
    true
}
