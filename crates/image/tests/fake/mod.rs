//! A registry on loopback that serves one image, and lies where a test tells it to.

use a3s_box_image::{Digest, Images, Limits, Options};
use futures::StreamExt;
use http_body_util::{BodyExt, StreamBody};
use hyper::{
    Request, Response,
    body::{Frame, Incoming},
    header::HeaderMap,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde_json::json;
use std::{
    collections::BTreeMap,
    convert::Infallible,
    io::Write,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::net::TcpListener;

pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
pub const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
pub const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
pub const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";
pub const DOCKER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";

/// One answer, before it is told.
#[derive(Debug, Clone, Default)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// The connection breaks after so many bytes of the body.
    pub breaks_after: Option<usize>,
    /// Nothing is answered at all.
    pub silent: bool,
}

impl Answer {
    pub fn status(status: u16) -> Self {
        Self { status, ..Self::default() }
    }

    pub fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    pub fn json(value: &serde_json::Value) -> Self {
        Self { status: 200, body: value.to_string().into_bytes(), ..Self::default() }
    }
}

/// What the registry does to an answer: path below the API, the request's headers, the honest answer.
pub type Lie = dyn Fn(&str, &HeaderMap, Answer) -> Answer + Send + Sync;

/// Documents and blobs by the path they are served under.
#[derive(Debug, Clone, Default)]
pub struct Content(BTreeMap<String, (String, Vec<u8>)>);

impl Content {
    /// Serves a blob.
    pub fn blob(&mut self, bytes: Vec<u8>) -> Digest {
        let digest = Digest::of(&bytes);
        self.0.insert(format!("x/blobs/{digest}"), ("application/octet-stream".to_owned(), bytes));
        digest
    }

    /// Serves a document under its digest and this tag.
    pub fn document(&mut self, tag: &str, kind: &str, text: &serde_json::Value) -> Digest {
        let bytes = text.to_string().into_bytes();
        let digest = Digest::of(&bytes);
        for name in [tag, &digest.to_string()] {
            self.0.insert(format!("x/manifests/{name}"), (kind.to_owned(), bytes.clone()));
        }
        digest
    }

    /// Serves an image of one layer per type, each with a file of its number, under this tag.
    pub fn image(&mut self, tag: &str, kind: &str, architecture: &str, types: &[&str]) -> Digest {
        let tars: Vec<_> = (0..types.len()).map(tar).collect();
        let layers: Vec<_> = types
            .iter()
            .zip(&tars)
            .map(|(media_type, tar)| {
                let packed = pack(media_type, tar);
                let size = packed.len();
                json!({"mediaType": media_type, "digest": self.blob(packed).to_string(), "size": size})
            })
            .collect();
        let diff_ids: Vec<_> = tars.iter().map(|tar| Digest::of(tar).to_string()).collect();
        self.manifest(tag, kind, architecture, &layers, &diff_ids)
    }

    /// Serves a manifest of these layers.
    pub fn manifest(
        &mut self,
        tag: &str,
        kind: &str,
        architecture: &str,
        layers: &[serde_json::Value],
        diff_ids: &[String],
    ) -> Digest {
        let config = json!({
            "architecture": architecture, "os": "linux", "config": {"Cmd": ["/0"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        })
        .to_string()
        .into_bytes();
        let config_type = match kind {
            DOCKER_MANIFEST => "application/vnd.docker.container.image.v1+json",
            _ => "application/vnd.oci.image.config.v1+json",
        };
        let size = config.len();
        let config = self.blob(config).to_string();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": kind, "layers": layers,
            "config": {"mediaType": config_type, "digest": config, "size": size},
        });
        self.document(tag, kind, &manifest)
    }

    /// Serves an index of manifests and their architectures.
    pub fn index(&mut self, tag: &str, kind: &str, manifests: &[(&str, Digest)]) -> Digest {
        let manifests: Vec<_> = manifests
            .iter()
            .map(|(architecture, digest)| {
                json!({"digest": digest.to_string(), "size": 1,
                       "platform": {"os": "linux", "architecture": architecture}})
            })
            .collect();
        let index = json!({"schemaVersion": 2, "mediaType": kind, "manifests": manifests});
        self.document(tag, kind, &index)
    }
}

/// An archive with one file, `N`.
pub fn tar(number: usize) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    // Not to be compressed away: an answer that breaks in the middle has a middle.
    let content: Vec<u8> = (0..40_000_u32)
        .map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(number as u32) >> 13) as u8)
        .collect();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_cksum();
    let mut tar = tar::Builder::new(Vec::new());
    tar.append_data(&mut header, number.to_string(), &*content).unwrap();
    tar.into_inner().unwrap()
}

fn pack(media_type: &str, tar: &[u8]) -> Vec<u8> {
    match media_type {
        GZIP | DOCKER_GZIP => {
            let mut encoder =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(tar).unwrap();
            encoder.finish().unwrap()
        }
        ZSTD => zstd::encode_all(tar, 1).unwrap(),
        _ => tar.to_vec(),
    }
}

/// A registry that runs as long as the test's runtime, and the requests it has had.
pub struct Registry {
    pub address: String,
    pub asked: Arc<Mutex<Vec<String>>>,
}

impl Registry {
    pub async fn honest(content: Content) -> Self {
        Self::lying(content, |_, _, answer| answer).await
    }

    pub async fn lying(
        content: Content,
        lie: impl Fn(&str, &HeaderMap, Answer) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let state = Arc::new((content, Box::new(lie) as Box<Lie>, asked.clone()));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let state = state.clone();
                let service = service_fn(move |request| answer(state.clone(), request));
                let http = hyper::server::conn::http1::Builder::new();
                tokio::spawn(async move {
                    // A client that goes away, or speaks TLS first, is no concern of the test's.
                    http.serve_connection(TokioIo::new(stream), service).await.ok();
                });
            }
        });
        Self { address, asked }
    }

    /// The image's name under this tag or digest.
    pub fn image(&self, tag: &str) -> String {
        let mark = if tag.contains(':') { '@' } else { ':' };
        format!("{}/x{mark}{tag}", self.address)
    }
}

type State = Arc<(Content, Box<Lie>, Arc<Mutex<Vec<String>>>)>;
type Body =
    StreamBody<futures::stream::BoxStream<'static, Result<Frame<bytes::Bytes>, std::io::Error>>>;

async fn answer(state: State, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let (parts, body) = request.into_parts();
    let form = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let query = parts.uri.query().map(str::to_owned);
    let path = parts.uri.path().trim_start_matches("/v2/").to_owned();
    let asked = format!(
        "{} {path}?{}{}",
        parts.method,
        query.unwrap_or_default(),
        String::from_utf8_lossy(&form)
    );
    let (content, lie, log) = &*state;
    log.lock().unwrap().push(asked);
    let honest = match content.0.get(&path) {
        Some((kind, bytes)) => {
            let answer = Answer { status: 200, body: bytes.clone(), ..Answer::default() };
            answer
                .with("content-type", kind)
                .with("docker-content-digest", Digest::of(bytes).to_string())
        }
        None => Answer {
            body: br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"never heard of it"}]}"#
                .to_vec(),
            ..Answer::status(404)
        },
    };
    let answer = lie(&path, &parts.headers, honest);
    if answer.silent {
        std::future::pending::<()>().await;
    }
    let mut response = Response::builder().status(answer.status);
    if !answer.headers.iter().any(|(name, _)| name == "content-length") {
        response = response.header("content-length", answer.body.len());
    }
    for (name, value) in &answer.headers {
        response = response.header(name, value);
    }
    let head = parts.method == hyper::Method::HEAD;
    let frames = match (head, answer.breaks_after) {
        (true, _) => vec![],
        (false, None) => vec![Ok(Frame::data(answer.body.into()))],
        (false, Some(bytes)) => vec![
            Ok(Frame::data(answer.body[..bytes].to_vec().into())),
            Err(std::io::Error::other("it breaks here")),
        ],
    };
    let frames = futures::stream::iter(frames).then(|frame| async {
        if frame.is_err() {
            // What came before is sent while this waits.
            tokio::task::yield_now().await;
        }
        frame
    });
    let body: futures::stream::BoxStream<'static, _> = Box::pin(frames);
    Ok(response.body(StreamBody::new(body)).unwrap())
}

/// A store that has patience for tests.
pub fn store(folder: &Path, certs: Option<&Path>) -> Arc<Images> {
    let limits = Limits {
        answer: Duration::from_millis(500),
        stall: Duration::from_millis(500),
        rounds: 2,
        pause: Duration::from_millis(1),
        ..Limits::default()
    };
    let registry_config = certs.map(Path::to_owned);
    let options = Options { registry_config, limits, ..Options::default() };
    Arc::new(Images::open(folder, options).unwrap())
}
