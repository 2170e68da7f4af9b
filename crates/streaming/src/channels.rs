//! What SPDY and WebSocket sessions have in common.

use crate::{AttachRequest, ExecRequest, TerminalSize};
use tokio::sync::{mpsc, watch};

/// No size is that long.
const LONGEST_SIZE: usize = 4096;

/// Streams that a request calls for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub tty: bool,
}

impl From<&ExecRequest> for Wanted {
    fn from(request: &ExecRequest) -> Self {
        let ExecRequest { stdin, stdout, stderr, tty, .. } = *request;
        Self { stdin, stdout, stderr: stderr && !tty, tty }
    }
}

impl From<&AttachRequest> for Wanted {
    fn from(request: &AttachRequest) -> Self {
        let AttachRequest { stdin, stdout, stderr, tty, .. } = *request;
        Self { stdin, stdout, stderr: stderr && !tty, tty }
    }
}

/// From bytes of a resize stream to the backend. A backend that is busy misses sizes but never the
/// last one, and holds up nothing.
pub(crate) fn sizes() -> (SizeReader, mpsc::Receiver<TerminalSize>) {
    let (latest, mut changes) = watch::channel(None);
    let (sizes, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            // A place first: what waits for one is then the newest.
            let Ok(place) = sizes.reserve().await else { return };
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                () = sizes.closed() => return,
            }
            if let Some(size) = *changes.borrow_and_update() {
                place.send(size);
            }
        }
    });
    (SizeReader { parser: Sizes::default(), latest }, receiver)
}

/// See [`sizes`].
#[derive(Debug)]
pub(crate) struct SizeReader {
    parser: Sizes,
    latest: watch::Sender<Option<TerminalSize>>,
}

impl SizeReader {
    /// Takes in what came on the resize stream.
    pub fn read(&mut self, bytes: &[u8]) {
        if let Some(size) = self.parser.read(bytes).pop() {
            // Nobody asks for sizes any more: there is no harm in that.
            self.latest.send(Some(size)).ok();
        }
    }
}

/// Reads terminal sizes out of a stream of JSON values.
#[derive(Debug, Default)]
struct Sizes(Vec<u8>);

impl Sizes {
    /// The sizes that are whole now. What is no size is dropped.
    fn read(&mut self, bytes: &[u8]) -> Vec<TerminalSize> {
        self.0.extend_from_slice(bytes);
        let mut sizes = Vec::new();
        let mut values = serde_json::Deserializer::from_slice(&self.0).into_iter();
        let mut read = 0;
        loop {
            match values.next() {
                Some(Ok(size)) => {
                    sizes.push(size);
                    read = values.byte_offset();
                }
                Some(Err(error)) if error.is_eof() => break,
                Some(Err(_)) => {
                    read = self.0.len();
                    break;
                }
                None => {
                    read = self.0.len();
                    break;
                }
            }
        }
        self.0.drain(..read);
        if self.0.len() > LONGEST_SIZE {
            self.0.clear();
        }
        sizes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_however_they_are_cut() {
        let text = b"{\"Width\":80,\"Height\":24}\n{\"Width\":132,\"Height\":50}\n";
        for cut in 0..text.len() {
            let mut sizes = Sizes::default();
            let mut all = sizes.read(&text[..cut]);
            all.extend(sizes.read(&text[cut..]));
            let expected =
                [(80, 24), (132, 50)].map(|(width, height)| TerminalSize { width, height });
            assert_eq!(all, expected, "{cut}");
        }
        let mut sizes = Sizes::default();
        assert!(sizes.read(b"nonsense").is_empty());
        assert_eq!(sizes.read(&text[..25]).len(), 1);
        assert!(sizes.read(&[b'['; 10_000]).is_empty());
        assert_eq!(sizes.read(&text[..25]).len(), 1);
    }

    #[tokio::test]
    async fn a_busy_backend_gets_the_last_size_and_holds_nothing_up() {
        let (mut reader, mut sizes) = sizes();
        for width in 1..=100 {
            reader.read(format!("{{\"Width\":{width},\"Height\":1}}").as_bytes());
            tokio::task::yield_now().await;
        }
        drop(reader);
        let mut last = None;
        while let Some(size) = sizes.recv().await {
            last = Some(size.width);
        }
        assert_eq!(last, Some(100));
    }
}
