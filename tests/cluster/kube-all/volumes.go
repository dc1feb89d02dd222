package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
)

// The StorageClass of the local cluster names this as its provisioner.
const provisionerName = "joulecast.dev/shared-directory"

// The controller manager writes the first on claims that wait for an external provisioner, and reads the second to
// know that somebody else deletes the volume.
const (
	annotationWanted = "volume.kubernetes.io/storage-provisioner"
	annotationMadeBy = "pv.kubernetes.io/provisioned-by"
)

// A failed step is tried again at the next resync, which hands every object to the handlers once more.
const resync = 5 * time.Second

// provisioner makes one directory per claim and removes it with the volume. Every node of the local cluster sees the
// same directory, so a volume behaves like a shared file system. The controller manager's own host-path provisioner
// does not do here: its directories are mode 0750, and pods that do not run as root cannot write to them.
type provisioner struct {
	client    kubernetes.Interface
	directory string
}

func runVolumeProvisioner(args []string) int {
	flags := flag.NewFlagSet(args[0], flag.ExitOnError)
	kubeconfig := flags.String("kubeconfig", "", "how to reach the API server (a file)")
	directory := flags.String("directory", "", "absolute directory that holds one directory per volume")
	_ = flags.Parse(args[1:]) // ExitOnError
	if !filepath.IsAbs(*directory) {
		fmt.Fprintf(os.Stderr, "--directory: %q is not an absolute path\n", *directory)
		return 2
	}
	config, err := clientcmd.BuildConfigFromFlags("", *kubeconfig)
	if err != nil {
		fmt.Fprintf(os.Stderr, "--kubeconfig: %v\n", err)
		return 1
	}
	p := provisioner{client: kubernetes.NewForConfigOrDie(config), directory: filepath.Clean(*directory)}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	factory := informers.NewSharedInformerFactory(p.client, resync)
	handle(factory.Core().V1().PersistentVolumeClaims().Informer(), func(o any) error { return p.provide(ctx, o.(*corev1.PersistentVolumeClaim)) })
	handle(factory.Core().V1().PersistentVolumes().Informer(), func(o any) error { return p.reclaim(ctx, o.(*corev1.PersistentVolume)) })
	factory.Start(ctx.Done())
	<-ctx.Done()
	factory.Shutdown()
	return 0
}

func handle(informer cache.SharedIndexInformer, step func(any) error) {
	report := func(object any) {
		if err := step(object); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}
	_, _ = informer.AddEventHandler(cache.ResourceEventHandlerFuncs{ // fails only on a stopped informer
		AddFunc:    report,
		UpdateFunc: func(_, object any) { report(object) },
	})
}

// provide gives a waiting claim a directory and a volume that only this claim can bind.
func (p provisioner) provide(ctx context.Context, claim *corev1.PersistentVolumeClaim) error {
	if claim.Annotations[annotationWanted] != provisionerName || claim.Spec.VolumeName != "" || claim.DeletionTimestamp != nil {
		return nil
	}
	name := "pvc-" + string(claim.UID)
	path := filepath.Join(p.directory, name)
	if err := os.MkdirAll(path, 0o777); err != nil {
		return fmt.Errorf("claim %s/%s: %w", claim.Namespace, claim.Name, err)
	}
	if err := os.Chmod(path, 0o777); err != nil { // MkdirAll is subject to the umask
		return fmt.Errorf("claim %s/%s: %w", claim.Namespace, claim.Name, err)
	}
	kind := corev1.HostPathDirectory
	volume := &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: map[string]string{annotationMadeBy: provisionerName}},
		Spec: corev1.PersistentVolumeSpec{
			Capacity:                      claim.Spec.Resources.Requests,
			AccessModes:                   claim.Spec.AccessModes,
			PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimDelete,
			StorageClassName:              *claim.Spec.StorageClassName, // the annotation is only written where a class is named
			PersistentVolumeSource:        corev1.PersistentVolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: path, Type: &kind}},
			ClaimRef: &corev1.ObjectReference{
				APIVersion: "v1", Kind: "PersistentVolumeClaim", Namespace: claim.Namespace, Name: claim.Name, UID: claim.UID,
			},
		},
	}
	_, err := p.client.CoreV1().PersistentVolumes().Create(ctx, volume, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("claim %s/%s: %w", claim.Namespace, claim.Name, err)
	}
	return nil
}

// reclaim removes the directory of a volume whose claim is gone, then the volume.
func (p provisioner) reclaim(ctx context.Context, volume *corev1.PersistentVolume) error {
	released := volume.Status.Phase == corev1.VolumeReleased && volume.Spec.PersistentVolumeReclaimPolicy == corev1.PersistentVolumeReclaimDelete
	if volume.Annotations[annotationMadeBy] != provisionerName || !released || volume.DeletionTimestamp != nil {
		return nil
	}
	// never what the object says, only what this program would have made for it
	if err := os.RemoveAll(filepath.Join(p.directory, filepath.Base(volume.Name))); err != nil {
		return fmt.Errorf("volume %s: %w", volume.Name, err)
	}
	err := p.client.CoreV1().PersistentVolumes().Delete(ctx, volume.Name, metav1.DeleteOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("volume %s: %w", volume.Name, err)
	}
	return nil
}
