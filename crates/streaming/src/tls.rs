//! TLS in front of the HTTP server.

use rustls_pki_types::{
    CertificateDer, PrivateKeyDer,
    pem::{self, PemObject},
};
use std::{fmt, io, sync::Arc};
use tokio::net::TcpStream;
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        self, RootCertStore, ServerConfig,
        crypto::ring,
        server::{VerifierBuilderError, WebPkiClientVerifier},
    },
    server::TlsStream,
};

/// A server's certificate, and whose clients it takes.
#[derive(Clone)]
pub struct Tls(TlsAcceptor);

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").finish_non_exhaustive()
    }
}

/// What is given is no certificate or key.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// No PEM where there should be.
    #[error("{0} is no PEM")]
    Pem(&'static str, #[source] pem::Error),
    /// The certificate and the key are not of use, or not together.
    #[error("certificate and key")]
    Certificate(#[source] rustls::Error),
    /// A client CA that is none.
    #[error("client CA")]
    ClientCa(#[source] rustls::Error),
    /// No client could ever be verified.
    #[error("client CA")]
    Verifier(#[source] VerifierBuilderError),
}

impl Tls {
    /// From PEM: the certificate and those above it, its key, and if only some clients are welcome, the
    /// CAs that sign for them.
    ///
    /// # Errors
    /// They are none, or do not belong together.
    pub fn new(certificate: &[u8], key: &[u8], client_ca: Option<&[u8]>) -> Result<Self, TlsError> {
        let chain = certificates("the certificate", certificate)?;
        let key =
            PrivateKeyDer::from_pem_slice(key).map_err(|error| TlsError::Pem("the key", error))?;
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(TlsError::Certificate)?;
        let builder = match client_ca {
            None => builder.with_no_client_auth(),
            Some(client_ca) => {
                let mut roots = RootCertStore::empty();
                for root in certificates("the client CA", client_ca)? {
                    roots.add(root).map_err(TlsError::ClientCa)?;
                }
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                        .build()
                        .map_err(TlsError::Verifier)?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let mut config = builder.with_single_cert(chain, key).map_err(TlsError::Certificate)?;
        // Upgrades are of HTTP/1.1.
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self(TlsAcceptor::from(Arc::new(config))))
    }

    pub(crate) async fn accept(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        self.0.accept(stream).await
    }
}

fn certificates(what: &'static str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(found) if found.is_empty() => Err(TlsError::Pem(what, pem::Error::NoItemsFound)),
        Ok(found) => Ok(found),
        Err(error) => Err(TlsError::Pem(what, error)),
    }
}
