// Command kube-all is one binary for every Kubernetes component of the local test cluster: the component is the
// program's name (a symlink) or its first argument. One binary links the common libraries once (150 MB instead of 500).
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/etcdmain"
	_ "k8s.io/client-go/plugin/pkg/client/auth" // so that kubectl can use any kubeconfig, not only the local cluster's
	"k8s.io/component-base/cli"
	"k8s.io/component-base/logs"
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	kubectl "k8s.io/kubectl/pkg/cmd"
	kubectlutil "k8s.io/kubectl/pkg/cmd/util"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllermanager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

// Only the chosen component is constructed: several of them register the same global flags and feature gates.
// Each gets the arguments with its own name in front, and returns the exit status.
var components = map[string]func(args []string) int{
	"etcd":                    func(args []string) int { etcdmain.Main(args); return 0 },
	"kube-apiserver":          command(apiserver.NewAPIServerCommand),
	"kube-controller-manager": command(controllermanager.NewControllerManagerCommand),
	"kube-scheduler":          command(func() *cobra.Command { return scheduler.NewSchedulerCommand() }),
	"kubelet":                 command(func() *cobra.Command { return kubelet.NewKubeletCommand(context.Background()) }),
	"kubectl":                 runKubectl,
	"volume-provisioner":      runVolumeProvisioner,
}

func main() {
	args := os.Args
	run, known := components[filepath.Base(args[0])]
	if !known && len(args) > 1 {
		args = args[1:]
		run, known = components[args[0]]
	}
	if !known {
		names := make([]string, 0, len(components))
		for name := range components {
			names = append(names, name)
		}
		sort.Strings(names)
		fmt.Fprintf(os.Stderr, "usage: kube-all COMPONENT [FLAGS], where COMPONENT is one of %s\n", strings.Join(names, ", "))
		os.Exit(2)
	}
	os.Args = args
	os.Exit(run(args))
}

func command(construct func() *cobra.Command) func([]string) int {
	return func([]string) int { return cli.Run(construct()) }
}

// kubectl reads its verbosity before its flags are parsed, and prints errors in a form of its own.
func runKubectl(args []string) int {
	if _, err := logs.GlogSetter(kubectl.GetLogVerbosity(args)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	kubectlutil.CheckErr(cli.RunNoErrOutput(kubectl.NewDefaultKubectlCommand()))
	return 0
}
