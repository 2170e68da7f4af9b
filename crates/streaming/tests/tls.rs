//! The server behind TLS.
#![allow(clippy::unwrap_used)]

mod common;

use a3s_box_streaming::{Server, Tls, TlsError};
use common::{Running, config, split};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use std::sync::Arc;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{ClientConfig, RootCertStore, crypto::ring},
};

type Ca = CertifiedIssuer<'static, KeyPair>;

fn ca() -> Ca {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

fn signed(ca: &Ca) -> (rcgen::Certificate, KeyPair) {
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    (params.signed_by(&key, ca).unwrap(), key)
}

fn client(server_ca: &Ca, identity: Option<&(rcgen::Certificate, KeyPair)>) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    roots.add(server_ca.der().clone()).unwrap();
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let config = match identity {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain: Vec<CertificateDer> = vec![certificate.der().clone()];
            let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
            builder.with_client_auth_cert(chain, key).unwrap()
        }
    };
    TlsConnector::from(Arc::new(config))
}

/// The first line of what the server answers.
async fn ask(url: &str, connector: &TlsConnector) -> std::io::Result<String> {
    let (host, path) = split(url);
    let stream = TcpStream::connect(host).await?;
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let mut stream = connector.connect(name, stream).await?;
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\
         X-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await?;
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).await?;
    Ok(String::from_utf8(answer.to_vec()).unwrap())
}

#[tokio::test]
async fn urls_are_https_and_sessions_begin_behind_tls() {
    let ca = ca();
    let (certificate, key) = signed(&ca);
    let tls = Tls::new(certificate.pem().as_bytes(), key.serialize_pem().as_bytes(), None).unwrap();
    let server = Running::with(Server::bind(config()).await.unwrap().with_tls(tls).unwrap());
    let url = server.exec("i", "exit 0");
    assert!(url.starts_with("https://127.0.0.1:"), "{url}");
    assert_eq!(ask(&url, &client(&ca, None)).await.unwrap(), "HTTP/1.1 101");
}

#[tokio::test]
async fn with_a_client_ca_only_its_clients_are_welcome() {
    let (ca, other) = (ca(), ca());
    let (certificate, key) = signed(&ca);
    let tls = Tls::new(
        certificate.pem().as_bytes(),
        key.serialize_pem().as_bytes(),
        Some(ca.pem().as_bytes()),
    );
    let server =
        Running::with(Server::bind(config()).await.unwrap().with_tls(tls.unwrap()).unwrap());
    let url = server.exec("i", "exit 0");
    assert!(ask(&url, &client(&ca, None)).await.is_err());
    assert!(ask(&url, &client(&ca, Some(&signed(&other)))).await.is_err());
    assert_eq!(ask(&url, &client(&ca, Some(&signed(&ca)))).await.unwrap(), "HTTP/1.1 101");
}

#[test]
fn what_is_no_certificate_is_named() {
    let (certificate, key) = signed(&ca());
    let (certificate, key) = (certificate.pem(), key.serialize_pem());
    let other = KeyPair::generate().unwrap().serialize_pem();
    let new = |certificate: &str, key: &str, ca: Option<&[u8]>| {
        Tls::new(certificate.as_bytes(), key.as_bytes(), ca).unwrap_err()
    };
    assert!(matches!(new("", &key, None), TlsError::Pem("the certificate", _)));
    assert!(matches!(new(&certificate, "", None), TlsError::Pem("the key", _)));
    assert!(matches!(new(&certificate, &key, Some(b"")), TlsError::Pem("the client CA", _)));
    assert!(matches!(new(&certificate, &other, None), TlsError::Certificate(_)));
}
