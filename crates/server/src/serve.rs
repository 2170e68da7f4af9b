//! The server as a whole: what all RPCs share, and its life from the socket to SIGTERM.
//!
//! Ending the server ends no pod: shims are processes of their own, and everything known of a
//! sandbox is on disk or in its shim.

use crate::{
    config::{Config, TlsFiles},
    image_store,
    images::{ForContainers, ImageStore},
    instruments::Instruments,
    metrics_endpoint,
    node::Node,
    service::Service,
    streaming::Pods,
    templates::GuestTemplates,
};
use a3s_box_api::cri::{
    image_service_server::ImageServiceServer, runtime_service_server::RuntimeServiceServer,
};
use a3s_box_net::Cni;
use a3s_box_streaming::{Tls, Urls};
use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};
use std::{
    fs::{self, DirBuilder, File, Permissions},
    future::Future,
    io,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::Path,
    sync::Arc,
    time::Duration,
};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tracing::{info, warn};

/// How long RPCs may still run after SIGTERM.
const DRAIN: Duration = Duration::from_secs(5);

/// What all RPCs share.
pub struct Server {
    /// As read at the start.
    pub config: Config,
    /// Pulled images.
    pub images: Arc<dyn ImageStore>,
    /// Pods' networks.
    pub cni: Arc<Cni>,
    /// What virtual machines are cloned from.
    pub templates: GuestTemplates,
    /// Sandboxes and containers.
    pub node: Arc<Node>,
    /// Where exec, attach and port-forward are served.
    pub urls: Urls,
}

impl Server {
    /// Opens everything; nothing is begun and nothing answered yet. Call inside a runtime.
    pub fn open(config: Config, urls: Urls) -> Result<Self> {
        let images = image_store::open(&config).context("open the image store")?;
        let network = &config.network;
        let cni = Cni::new(
            &network.conf_dir,
            &network.bin_dirs,
            &config.root.join("cni"),
            network.plugin_timeout,
        );
        let cni = Arc::new(cni.context("open the records of pods' networks")?);
        let instruments = Arc::new(Instruments::new());
        let templates = GuestTemplates::new(&config, instruments.clone());
        let for_containers = Box::new(ForContainers(images.clone()));
        let for_sandboxes = Arc::new(templates.clone());
        let node = Node::open(&config, cni.clone(), for_sandboxes, for_containers, instruments)
            .context("open the records of sandboxes")?;
        Ok(Self { config, images, cni, templates, node: Arc::new(node), urls })
    }
}

/// Runs the server until `stop` is done.
pub async fn serve(config: Config, stop: impl Future<Output = ()>) -> Result<()> {
    for folder in [&config.root, &config.state] {
        private_folder(folder).with_context(|| format!("make folder {}", folder.display()))?;
    }
    let _lock = lock(&config.state)?;
    let socket = config.socket.clone();
    let streaming = streaming_server(&config).await?;
    let metrics = match config.metrics.address {
        Some(address) => Some(metrics_endpoint::bind(address).await?),
        None => None,
    };
    let server = Arc::new(Server::open(config, streaming.urls())?);
    server.node.sandboxes.recover().await.context("take in the sandboxes of a former server")?;
    let spares = server.node.sandboxes.deps().spares.clone();
    let (templates, filled) = (server.templates.clone(), spares.clone());
    let preparing = tokio::spawn(async move {
        templates.prepare().await;
        filled.fill();
    });
    let streaming = tokio::spawn(streaming.serve(Arc::new(Pods(server.node.clone()))));
    let metrics = metrics.map(|at| tokio::spawn(metrics_endpoint::serve(at, server.clone())));
    let listener = listen(&socket).with_context(|| format!("listen on {}", socket.display()))?;
    info!(socket = %socket.display(), version = crate::version::RUNTIME_VERSION, "serving");
    notify_ready();
    answer(server, listener, stop).await?;
    preparing.abort();
    streaming.abort();
    if let Some(metrics) = metrics {
        metrics.abort();
    }
    spares.end().await;
    if let Err(error) = fs::remove_file(&socket) {
        warn!(%error, socket = %socket.display(), "cannot remove the socket");
    }
    info!("stopped; pods go on");
    Ok(())
}

/// Listens for clients of exec, attach and port-forward, as configured.
pub(crate) async fn streaming_server(config: &Config) -> Result<a3s_box_streaming::Server> {
    let streaming = &config.streaming;
    let settings = a3s_box_streaming::Config {
        address: streaming.address,
        advertised: streaming.advertised.clone(),
        idle: streaming.idle_timeout,
        creation: streaming.creation_timeout,
    };
    let bound = a3s_box_streaming::Server::bind(settings).await;
    let server =
        bound.with_context(|| format!("listen on {} (streaming.address)", streaming.address))?;
    match &streaming.tls {
        None => Ok(server),
        Some(files) => Ok(server.with_tls(tls(files)?)?),
    }
}

fn tls(files: &TlsFiles) -> Result<Tls> {
    let read = |path: &Path| fs::read(path).with_context(|| format!("read {}", path.display()));
    let (certificate, key) = (read(&files.certificate)?, read(&files.key)?);
    let client_ca = files.client_ca.as_deref().map(read).transpose()?;
    Tls::new(&certificate, &key, client_ca.as_deref())
        .with_context(|| format!("TLS with {} (streaming.tls_*)", files.certificate.display()))
}

/// Answers RPCs until `stop`, then gives those under way a moment.
async fn answer(
    server: Arc<Server>,
    listener: UnixListener,
    stop: impl Future<Output = ()>,
) -> Result<()> {
    let events = server.node.sandboxes.deps().events.clone();
    let service = Service(server);
    let (stopping, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = tonic::transport::Server::builder()
        .add_service(
            RuntimeServiceServer::new(service.clone()).max_decoding_message_size(MESSAGE_MAX),
        )
        .add_service(ImageServiceServer::new(service).max_decoding_message_size(MESSAGE_MAX))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async {
            // The sender is dropped only when this function ends, which is a stop as well.
            stopped.await.unwrap_or_default();
        });
    tokio::pin!(serving);
    tokio::select! {
        result = &mut serving => return result.context("serve"),
        () = stop => {}
    }
    drop(stopping);
    events.close();
    match tokio::time::timeout(DRAIN, serving).await {
        Ok(result) => result.context("serve"),
        Err(_) => {
            warn!("calls are still under way; their work is on disk and goes on at the next start");
            Ok(())
        }
    }
}

/// As large as kubelet's client allows.
const MESSAGE_MAX: usize = 16 << 20;

fn private_folder(path: &Path) -> io::Result<()> {
    // Others may pass through, to what they have been given by name, and list nothing.
    DirBuilder::new().recursive(true).mode(0o711).create(path)
}

/// Two servers on one state folder would end each other's pods.
fn lock(state: &Path) -> Result<File> {
    let path = state.join("server.lock");
    let file = File::create(&path).with_context(|| format!("open {}", path.display()))?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)
        .with_context(|| format!("another server runs on {}", state.display()))?;
    Ok(file)
}

/// Listens on the socket, which only root may use. A socket left by a dead server is replaced.
fn listen(socket: &Path) -> io::Result<UnixListener> {
    if let Some(folder) = socket.parent() {
        private_folder(folder)?;
    }
    match fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(socket)?;
    fs::set_permissions(socket, Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Tells systemd, when it asked for that, that calls are answered from now on.
fn notify_ready() {
    use std::os::{linux::net::SocketAddrExt, unix::net};
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let bytes = name.as_encoded_bytes();
    let address = match bytes.strip_prefix(b"@") {
        Some(name) => net::SocketAddr::from_abstract_name(name),
        None => net::SocketAddr::from_pathname(&name),
    };
    let sent = address
        .and_then(|address| net::UnixDatagram::unbound()?.send_to_addr(b"READY=1", &address));
    if let Err(error) = sent {
        warn!(%error, "cannot tell the service manager that the server is ready");
    }
}
